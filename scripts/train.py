"""Trains what a config file says; the same command again goes on where it stopped.

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
python scripts/train.py --config=configs/qwen_32k.py --workdir=runs/mine --config.lora.rank=16
python scripts/train.py --config=run.yaml --workdir=runs/from_yaml
"""

import logging
import shlex
import sys
from pathlib import Path

import leaves_on_sigterm  # noqa: F401
from absl import flags

from lljax.config import validate
from lljax.config.flags import config_flag, read_flags, show
from lljax.errors import exit_cleanly
from lljax.hardware.compiler_flags import take_gpu_memory

CONFIG = config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: its checkpoints, metrics and report."
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:STOP, steps to trace into WORKDIR/profile for TensorBoard."
)


def main(argv) -> None:
    # force: an imported library has set up logging already, for warnings alone.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with exit_cleanly():
        read_flags(argv, __doc__, "config", "workdir")
        validate(CONFIG.value)
    train()


def train() -> None:
    # Imported here: it takes seconds, and errors on the command line come first.
    from lljax.evaluation.eval_hook import make_eval_hook
    from lljax.parallel import processes as distributed
    from lljax.run import loop
    from lljax.run.profile import read_steps

    for noisy in ("jax", "orbax", "httpx", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Orbax logs a save that failed with its traceback; lljax says it in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with distributed.to_the_end(), distributed.session(), exit_cleanly():
        distributed.start(CONFIG.value.mesh.peer_timeout)
        take_gpu_memory()  # of this process's share: it must know of the others
        loop.train(
            CONFIG.value,
            WORKDIR.value,
            examiner=make_eval_hook,
            profile_steps=read_steps(PROFILE_STEPS.value),
        )
        if distributed.first():
            show(next_commands(WORKDIR.value, CONFIG.value.data))


def next_commands(workdir: str, data) -> str:
    """The lines that a finished run ends with: its report, and the commands that come next."""
    report = shlex.quote(str(Path(workdir) / "report.html"))
    run = f"--workdir={shlex.quote(workdir)}"
    tasks = "perplexity,passkey" if data.valid or data.valid_fraction else "passkey"
    return (
        f"Done. The report is {report}. Next:\n"
        f"python scripts/export.py {run} --format=peft     # or merged, split\n"
        f"python scripts/evaluate.py {run} --tasks={tasks}\n"
        f"python scripts/generate.py {run} --prompt='Once upon a time'"
    )


if __name__ == "__main__":
    main(sys.argv)
