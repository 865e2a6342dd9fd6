"""Checks that a long run keeps its memory, its speed, its programs and its open files.

lljax data stdlib --out=data/stdlib.jsonl
python scripts/bench/soak.py --workdir=runs/soak

Trains as configs/quickstart.py does, in three stages, with a checkpoint every 50 steps and a report
every 200; an observer reads the state of the process after every step. Prints a table in Markdown
and draws soak.html into --workdir. Steps of another length or attention take another time, so a
stage is compared with itself: the last fifth of its steps with the second fifth (of the last stage
of 2,000 steps: 1,801 to 2,000 with 1,201 to 1,400). Compilations count after the first step of a
stage. On Linux. Exit code 1: a limit is exceeded.
"""

import argparse
import dataclasses
import itertools
import logging
import os
import runpy
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from lljax.errors import ConfigError, exit_cleanly
from lljax.report.content import Figure, Section
from lljax.report.drawing import svg
from lljax.report.numbers import short_length
from lljax.report.page import write_page
from lljax.report.step_chart import Band, Line, line_chart, smoothed
from lljax.run import loop
from lljax.run.observer import Observer

ROOT = Path(__file__).resolve().parents[2]
# (share of the steps, length, attention)
STAGES = ((0.25, 512, "shifted"), (0.5, 1024, "shifted"), (1.0, 1024, "full"))
# the limits: MB a stage grows by, and what its last steps take of its first
MB, GROWN, SLOWER = 2**20, 50, 1.05


@dataclasses.dataclass(frozen=True)
class Reading:
    """The process after a step.

    seconds: of the step. cpu: seconds of all threads since the process began. resident: MB.
    compiled: programs so far.
    """

    stage: int
    step: int
    seconds: float
    cpu: float
    resident: float
    files: int
    threads: int
    compiled: int


class Readings(Observer):
    """Takes a `Reading` after every step."""

    def __init__(self):
        self.readings: list[Reading] = []
        self._compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compiled += event.endswith("/backend_compile_duration")

    def step(self, record: dict) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.readings.append(
            Reading(
                stage=record["stage"],
                step=record["step"],
                seconds=record["seconds"],
                cpu=time.process_time(),
                resident=pages * os.sysconf("SC_PAGESIZE") / MB,
                files=len(os.listdir("/proc/self/fd")),
                threads=len(os.listdir("/proc/self/task")),
                compiled=self._compiled,
            )
        )


def growth(readings: list[Reading]) -> dict[str, float]:
    """The last fifth of a stage compared with its second fifth, by medians: ratios for times,
    differences for the rest; and the programs compiled after its first step.
    """
    n = len(readings)
    early, late = readings[n // 5 : 2 * n // 5], readings[n - n // 5 :]

    def middle(some, name):
        return statistics.median(getattr(reading, name) for reading in some)

    def cpu(some):
        return statistics.median(b.cpu - a.cpu for a, b in itertools.pairwise(some))

    return {
        "seconds": middle(late, "seconds"),
        "slower": middle(late, "seconds") / middle(early, "seconds"),
        "cpu": cpu(late) / cpu(early),
        "compiled": readings[-1].compiled - readings[0].compiled,
        "resident": middle(late, "resident"),
        **{
            f"more_{name}": middle(late, name) - middle(early, name)
            for name in ("resident", "files", "threads")
        },
    }


def table(stages: dict[str, dict]) -> str:
    columns = (
        "step, s",
        "last by first",
        "in CPU time",
        "compilations",
        "RSS, MB",
        "grown by, MB",
        "files",
        "threads",
    )
    lines = ["| stage | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, of in stages.items():
        more = " | ".join(f"{of[f'more_{what}']:+.0f}" for what in ("resident", "files", "threads"))
        lines.append(
            f"| {name} | {of['seconds']:.3f} | {of['slower']:.3f} | {of['cpu']:.3f} "
            f"| {of['compiled']} | {of['resident']:,.0f} | {more} |"
        )
    return "\n".join([*lines, f"| at most | | {SLOWER} | | 0 | | {GROWN} | 0 | 0 |"])


def exceeded(of: dict) -> bool:
    return (
        of["slower"] > SLOWER
        or of["compiled"] > 0
        or of["more_resident"] > GROWN
        or of["more_files"] > 0
        or of["more_threads"] > 0
    )


def curves(readings: list[Reading]) -> list[Figure]:
    """Resident memory and seconds of every step, with the stages shaded."""
    x, stage = np.array([r.step for r in readings]), np.array([r.stage for r in readings])
    edges = [0, *np.flatnonzero(np.diff(stage)) + 1, len(x) - 1]
    bands = [
        Band(float(x[start]), float(x[stop]), f"{length:,}", attention, short_length(length))
        for start, stop, (_, length, attention) in zip(edges, edges[1:], STAGES, strict=False)
    ]
    figures = []
    for title, values in (
        ("Resident memory, MB", [r.resident for r in readings]),
        ("Seconds a step", [r.seconds for r in readings]),
    ):
        y = np.array(values)
        lines = [Line(x, y, "raw"), Line(x, smoothed(y, 51, stage), "smooth")]
        figure = line_chart(title, lines, bands=bands, from_zero=True)
        figures += [Figure(svg(figure, title))] if figure else []
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, force=True)
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.context.schedule = tuple(
        (round(share * given.steps), length, kind) for share, length, kind in STAGES
    )
    config.context.length = STAGES[-1][1]
    config.checkpoint.every_steps, config.training.report_every = 50, 200
    observer = Readings()
    with exit_cleanly():
        if given.steps < 100:
            raise ConfigError(
                f"--steps={given.steps}: a fifth of a stage is too little to compare; give at "
                "least 100"
            )
        if (given.workdir / "metrics.jsonl").exists():
            raise ConfigError(
                f"--workdir={given.workdir}: a run was started there; name a new folder"
            )
        loop.train(config, given.workdir, observers=[observer])
    readings = observer.readings
    stages = {
        f"{length:,} {kind}": growth([r for r in readings if r.stage == number])
        for number, (_, length, kind) in enumerate(STAGES)
    }
    print(table(stages))
    path = given.workdir / "soak.html"
    title = f"{given.steps:,} steps of {config.model.path}"
    write_page(path, title, [Section("Curves", figures=curves(readings))], finding=False)
    print(path)
    sys.exit(any(exceeded(of) for of in stages.values()))


if __name__ == "__main__":
    main()
