"""Measures the share of a run's time that checkpoints take, and metrics, alarms and report.

lljax data stdlib --out=data/stdlib.jsonl
python scripts/bench/overhead.py

One run as in configs/quickstart.py, on rows of one length, in blocks of 100 steps. Blocks with
checkpoints, and blocks with metrics and a report, take turns with bare blocks, so that a machine
that slows down slows all of them. Prints for each kind the time spent in its functions, over the
time of its blocks; and the ratio of its blocks to the two bare blocks beside them, in time and in
CPU time, which counts background threads too: median and quartiles. The cost does not depend on the
length: the shorter a step, the larger the share.
"""

import argparse
import contextlib
import logging
import runpy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lljax.config import Config
from lljax.errors import exit_cleanly
from lljax.run.loop import Run
from lljax.run.monitor import Monitor
from lljax.run.observer import Observer, RunInfo
from lljax.run.observers import Observers
from lljax.run.report_writer import ReportWriter
from lljax.run.tensorboard import TensorBoard
from lljax.run.watchdog import Watchdog
from lljax.training.curriculum import Stage
from lljax.training.step import robust_z

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"
BLOCK, EVERY = 100, 50  # steps of a block, steps to a checkpoint
TURN = ("bare", "checkpoints", "bare", "metrics")  # kinds of blocks


class Clock:
    """Times the work that belongs to blocks of one kind, and skips it in the other blocks."""

    def __init__(self):
        self.ends: list[tuple[float, float]] = []  # of blocks: (clock, CPU time), seconds
        self.spent: dict[int, float] = defaultdict(float)  # by the number of a block, seconds

    def only(self, kind: str, work: Callable, otherwise: Any = None) -> Any:
        """work() if the current block is of this kind, else `otherwise`."""
        if TURN[len(self.ends) % len(TURN)] != kind:
            return otherwise
        start = time.monotonic()
        value = work()
        self.spent[len(self.ends)] += time.monotonic() - start
        return value


class InBlocks(Observer):
    """Passes events to the observers that record a run, in blocks with metrics only."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._observers = Observers((ReportWriter, Monitor, TensorBoard))

    def open(self, run: RunInfo) -> None:
        self._opened = contextlib.ExitStack()
        self._opened.enter_context(self._observers.opened(run))

    def begin(self, step: int) -> None:
        self._clock.only("metrics", lambda: self._observers.begin(step))

    def step(self, record: dict) -> None:
        self._clock.only("metrics", lambda: self._observers.step(record))
        if record["step"] % BLOCK == 0:
            self._clock.ends.append((time.monotonic(), time.process_time()))

    def close(self, error: BaseException | None) -> None:
        self._opened.close()


class InBlocksRun(Run):
    """A run that makes records and saves checkpoints in their blocks only."""

    default_observers = (Watchdog,)

    def __init__(self, config: Config, workdir: Path, clock: Clock):
        super().__init__(config, workdir, observers=[InBlocks(clock)])
        self.clock = clock

    def record(self, stage: Stage, metrics: dict, speed: dict) -> dict:
        whole = lambda: super(InBlocksRun, self).record(stage, metrics, speed)
        return self.clock.only("metrics", whole, {"step": self.step})

    def save_if_due(self) -> None:
        self.clock.only("checkpoints", super().save_if_due)


def seconds_of_alarm(history: int, calls: int = 200) -> float:
    """The median of robust_z compiled alone, with its dispatch: an upper bound of its share of a
    step.
    """
    norms, alarm, taken = jnp.linspace(0, 1, history), jax.jit(robust_z), []
    for _ in range(calls):
        began = time.monotonic()
        alarm(jnp.float32(0.5), norms).block_until_ready()
        taken.append(time.monotonic() - began)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=8,
        help=f"times {len(TURN)} blocks that count, after one that does not",
    )
    parser.add_argument(
        "--length", type=int, default=512, help="tokens of a row; the quickstart has 1,024 or more"
    )
    arguments = parser.parse_args()
    turns, length = arguments.turns, arguments.length
    logging.basicConfig(level=logging.ERROR, force=True)
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.context.length = length
    # ends with a bare block
    config.context.schedule = (((turns + 1) * len(TURN) * BLOCK + BLOCK, length, "shifted"),)
    config.checkpoint.every_steps, config.training.report_every = EVERY, BLOCK
    config.data.valid_fraction = 0.0
    clock = Clock()
    with exit_cleanly(), tempfile.TemporaryDirectory() as workdir:
        InBlocksRun(config, Path(workdir), clock).train()
    wall, cpu = np.diff(clock.ends, axis=0).T  # of the blocks from the second on
    bare = float(np.median(wall[len(TURN) - 1 :: 2])) / BLOCK
    print(
        f"{config.model.path}, {length:,} tokens: {bare:.4f} s a step; the alarm's arithmetic "
        f"alone: {seconds_of_alarm(config.alarm.history) / bare:.2%} of it\n"
    )
    print(
        "| | of the time, in its functions | time with by without: median (quartiles) "
        "| CPU time with by without |\n|---|---|---|---|"
    )
    for name, title in (
        ("checkpoints", f"a checkpoint every {EVERY} steps"),
        ("metrics", f"metrics of every step, and a report every {BLOCK}"),
    ):
        blocks = range(len(TURN) + TURN.index(name), len(clock.ends) - 1, len(TURN))
        inside = sum(clock.spent[i] for i in blocks) / sum(wall[i - 1] for i in blocks)
        ratios = [
            np.quantile(
                [2 * spent[i - 1] / (spent[i - 2] + spent[i]) for i in blocks], (0.5, 0.25, 0.75)
            )
            for spent in (wall, cpu)
        ]
        print(
            f"| {title} | {inside:.2%} | "
            + " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*ratio) for ratio in ratios)
            + " |"
        )


if __name__ == "__main__":
    main()
