"""What checkpoints, and metrics, alarms and report, cost of a run's time.

lljax data stdlib --out=data/stdlib.jsonl
python scripts/bench/overhead.py

One run as in configs/quickstart.py, on rows of one length, in blocks of 100 steps. Blocks with
checkpoints, and blocks with metrics and a report, take turns with bare ones, so that a machine that
slows down slows all of them. Prints for each kind the time that the loop spent in its functions, by
the time of its blocks; and the ratio of its blocks to the two bare ones beside
them, in time and in CPU time, where what goes on in the background counts too: median and
  quartiles. What they cost does not depend on the length, and is so much the more of a step, the
  shorter it is.
"""

import argparse
import logging
import runpy
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lljax.errors import exit_cleanly
from lljax.run import loop
from lljax.training.step import robust_z

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"
BLOCK, EVERY = 100, 50  # steps of a block, steps to a checkpoint
TURN = ("bare", "checkpoints", "bare", "metrics")  # kinds of blocks


class Watch:
    """Times the loop's own functions, and leaves them out of the blocks that are not theirs."""

    def __init__(self):
        self.ends = []  # of blocks, seconds: (of the clock, of the CPUs)
        self.spent = defaultdict(float)  # by the number of a block, seconds

    def only(self, kind: str, call, otherwise=None):
        """call() where the block that is going on, or begins after a step, is of this kind;
        otherwise `otherwise`.
        """
        if TURN[len(self.ends) % len(TURN)] != kind:
            return otherwise
        began = time.monotonic()
        value = call()
        self.spent[len(self.ends)] += time.monotonic() - began
        return value

    def install(self) -> None:
        """The loop has no hooks for the sake of this: its names are set to what watches."""
        watch, write_report, learning_rate = self, loop.write_report, loop.learning_rate

        class Checkpoints(loop.Checkpoints):
            def due(self, step):
                return watch.only("checkpoints", lambda: super(Checkpoints, self).due(step), False)

            def save(self, *args, **kwargs):
                watch.only("checkpoints", lambda: super(Checkpoints, self).save(*args, **kwargs))

        class Monitor(loop.Monitor):
            def step(self, record):
                watch.only("metrics", lambda: super(Monitor, self).step(record))
                if record["step"] % BLOCK == 0:
                    watch.ends.append((time.monotonic(), time.process_time()))

        def schedule(*args):
            rate = learning_rate(*args)
            return lambda step: watch.only("metrics", lambda: float(rate(step)), 0.0)

        loop.Checkpoints, loop.Monitor, loop.learning_rate = Checkpoints, Monitor, schedule
        loop.write_report = lambda workdir: watch.only("metrics", lambda: write_report(workdir))


def seconds_of_alarm(history: int, calls: int = 200) -> float:
    """The median of robust_z compiled alone, with its dispatch: more than it costs inside of a
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
    watch = Watch()
    watch.install()
    with exit_cleanly(), tempfile.TemporaryDirectory() as workdir:
        loop.train(config, workdir)
    wall, cpu = np.diff(watch.ends, axis=0).T  # of the blocks from the second on
    bare = float(np.median(wall[len(TURN) - 1 :: 2])) / BLOCK
    print(
        f"{config.model.path}, {length:,} tokens: {bare:.4f} s a step; the alarm's arithmetic alone: "
        f"{seconds_of_alarm(config.alarm.history) / bare:.2%} of it\n"
    )
    print(
        "| | of the time, in its functions | time with by without: median (quartiles) | CPU time with by without |\n"
        "|---|---|---|---|"
    )
    for name, what in (
        ("checkpoints", f"a checkpoint every {EVERY} steps"),
        ("metrics", f"metrics of every step, and a report every {BLOCK}"),
    ):
        blocks = range(len(TURN) + TURN.index(name), len(watch.ends) - 1, len(TURN))
        inside = sum(watch.spent[i] for i in blocks) / sum(wall[i - 1] for i in blocks)
        ratios = [
            np.quantile(
                [2 * spent[i - 1] / (spent[i - 2] + spent[i]) for i in blocks], (0.5, 0.25, 0.75)
            )
            for spent in (wall, cpu)
        ]
        print(
            f"| {what} | {inside:.2%} | "
            + " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*ratio) for ratio in ratios)
            + " |"
        )


if __name__ == "__main__":
    main()
