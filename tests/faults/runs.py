"""One tiny run as real processes of scripts/train.py; its files are compared bit for bit."""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from run.cases import bits, last_step, records, steps_saved, wait_for_step

from lljax.build import placed_model
from lljax.interop.open import open_base
from lljax.parallel.sharding import make_mesh
from lljax.run.checkpoint import Checkpoints, abstract
from lljax.run.restore import read_config
from lljax.training.state import split, to_items

ROOT = Path(__file__).parents[2]
STEPS, SAVED_EVERY = 100, 5
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
IMPORTED = [
    "lljax.run.loop",
    "lljax.evaluation.eval_hook",
    "ml_collections.config_flags",
    "torch",
    "transformers.models.llama.configuration_llama",
    "transformers.models.auto.tokenization_auto",
]


class Left(NamedTuple):
    """The newest checkpoint of a run. bits: the bytes of every leaf."""

    step: int
    bits: list[bytes]
    loader: dict


class Run:
    """A workdir, and how processes are started in it. arguments: of scripts/train.py."""

    def __init__(self, workdir: Path, tiny: str, documents: str, *overrides: str):
        self.workdir, self.log = workdir, workdir.with_name(f"{workdir.name}.log")
        given = [
            "--config=configs/quickstart.py",
            f"--workdir={workdir}",
            f"--config.model.path={tiny}",
            f"--config.data.train=('{documents}',)",
            "--config.data.valid_fraction=0.2",
            "--config.context.length=64",
            "--config.lora.targets=('q_proj','v_proj')",
            f"--config.context.schedule=(({STEPS // 2},32,'shifted'),({STEPS},64,'full'))",
            "--config.training.rows=8",
            "--config.training.eval_every=10",
            f"--config.checkpoint.every_steps={SAVED_EVERY}",
            *overrides,
        ]
        # the last value of a flag: those of a field that holds several would be joined
        self.arguments = [*{flag.partition("=")[0]: flag for flag in given}.values()]

    def fork(self) -> multiprocessing.Process:
        """A process that runs the script from its first line, forked from one that has imported
        libraries and no more: that takes half of the time of a start.
        """
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(IMPORTED)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        process = server.Process(target=_script, args=(self.arguments, str(self.log)))
        process.start()
        return process

    def start(self) -> subprocess.Popen:
        """A process from nothing."""
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [sys.executable, "scripts/train.py", *self.arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | ONE_DEVICE | {"PYTHONPATH": str(ROOT)},
            )

    def finish(self) -> None:
        """Runs until it is done."""
        process = self.fork()
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-2000:]

    def last_line(self) -> str:
        return (self.log.read_text().strip().splitlines() or [""])[-1]

    # ---------------------------------------------------------------- files
    def records(self) -> list[dict]:
        return records(self.workdir)

    def last_record(self) -> int:
        return last_step(self.workdir)

    def steps(self) -> list[int]:
        """The steps with a checkpoint."""
        return steps_saved(self.workdir)

    def newest(self, step: int | None = None) -> Left | None:
        """The newest sound checkpoint, from which a run resumes (or the checkpoint of `step`)."""
        if not self.steps():
            return None
        checkpoints = Checkpoints(
            self.workdir, every_steps=1, every_minutes=1, keep=1, read_only=True
        )
        found, items, loader = checkpoints.restore(like(self.workdir), step)
        checkpoints.close()
        return Left(found, bits(items), loader)

    def wait_for_step(self, step: int, process, since: float) -> None:
        """Until a process that was started at `since` has recorded `step`, or is done."""
        wait_for_step(self.workdir, step, lambda: alive(process), since)


def _script(arguments, log) -> None:
    os.chdir(ROOT)
    os.environ |= ONE_DEVICE
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["scripts/train.py", *arguments]
    sys.path.insert(0, "scripts")  # as Python itself does
    runpy.run_path("scripts/train.py", run_name="__main__")


def alive(process) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def like(workdir: Path) -> dict:
    """The abstract items of a run's checkpoint."""
    return _like((workdir / "config.json").read_text(), workdir)


@functools.lru_cache(maxsize=4)
def _like(text: str, workdir: Path) -> dict:
    config = read_config(workdir)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = placed_model(config, open_base(config.model.path).config, mesh)
    return jax.tree.map(abstract, to_items(split(config, model, mesh).state))
