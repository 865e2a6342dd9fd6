"""Train from a config file; the same command again resumes from the last checkpoint.

lljax train --config=quickstart --workdir=runs/quickstart
lljax train --config=configs/qwen_32k.py --workdir=runs/mine --config.lora.rank=16
lljax train --config=run.yaml --workdir=runs/from_yaml
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from lljax.config import Config, validate
from lljax.config.exports import formats
from lljax.config.flags import config_flag, read_flags, show
from lljax.errors import exit_cleanly


def main(argv: Sequence[str]) -> None:
    """Reads the flags of `argv` and trains; exits with the code of an error."""
    run("train", argv, __doc__ or "")


def run(
    command: str, argv: Sequence[str], doc: str, check: Callable[[Config], None] = validate
) -> None:
    """Trains as `lljax COMMAND` with the flags of `argv`; exits with the code of an error.

    check: raises ConfigError if the configuration cannot work.
    """
    # force: an imported library has set up logging already, for warnings alone.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with exit_cleanly():
        values = _flags([f"lljax {command}", *argv], doc)
        check(values.config)
    train(values.config, values.workdir, values.profile_steps)


def _flags(argv: Sequence[str], doc: str) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flag(values, argv)
    for name, help in (
        ("workdir", "Folder of the run: its checkpoints, metrics and report."),
        ("profile_steps", "FIRST:STOP, steps to trace into WORKDIR/profile for TensorBoard."),
    ):
        flags.DEFINE_string(name, None, help, flag_values=values)
    read_flags(values, argv, doc, "config", "workdir")
    return values


def train(config: Config, workdir: str, profile_steps: str | None = None) -> None:
    """Trains as one process of the run and prints the next commands."""
    # Imported here: it takes seconds, and errors on the command line come first.
    from lljax.evaluation.eval_hook import make_eval_hook
    from lljax.hardware.compiler_flags import take_gpu_memory
    from lljax.parallel import processes
    from lljax.run import loop
    from lljax.run.profile import read_steps

    for noisy in ("jax", "orbax", "httpx", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Orbax logs a failed save with its traceback; lljax logs it as one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with processes.to_the_end(), processes.session(), exit_cleanly():
        processes.start(config.mesh.peer_timeout)
        take_gpu_memory(processes.processes_on_host)  # needs the number of processes on this host
        loop.train(
            config, workdir, make_eval_hook=make_eval_hook, profile_steps=read_steps(profile_steps)
        )
        if processes.is_first():
            show(next_commands(workdir, config))


def next_commands(workdir: str, config: Config) -> str:
    """The last lines of a finished run: the path of its report and the next commands."""
    from lljax.objectives.table import OBJECTIVES  # imported here, as in `train`

    report = shlex.quote(str(Path(workdir) / "report.html"))
    run = f"--workdir={shlex.quote(workdir)}"
    held_out = config.data.valid or config.data.valid_fraction
    documents = OBJECTIVES[config.objective.name].kind == "documents"
    tasks = "perplexity,passkey" if held_out and documents else "passkey"
    format, *others = formats(config.to_dict())
    alternatives = f"     # or {', '.join(others)}" if others else ""
    return (
        f"Done. The report is {report}. Next:\n"
        f"lljax export {run} --format={format}{alternatives}\n"
        f"lljax evaluate {run} --tasks={tasks}\n"
        f"lljax generate {run} --prompt='Once upon a time'"
    )
