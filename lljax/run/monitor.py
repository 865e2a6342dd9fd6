"""Records a run in metrics.jsonl and shows its progress on stderr."""

import collections
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lljax.data.files import atomic_write
from lljax.parallel.processes import is_first
from lljax.report.records import json_safe, read_metrics
from lljax.run.observer import Observer, RunInfo

# shown if the record has them
SPEED = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}
PLAIN_SECONDS = 10.0  # between two lines without a terminal
RECENT = 32  # steps from which the duration of later steps is estimated


class Monitor(Observer):
    """Writes metrics.jsonl and the progress bar; without a terminal, a line every 10 seconds.

    On resume, records of later steps are dropped first, so that the file equals the file of an
    uninterrupted run. Of several processes the first one writes. A progress display that cannot be
    written (the terminal was closed, the reader of a pipe has gone) stops no run; metrics.jsonl
    must be written.

    clock: seconds that only grow, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock

    def open(self, run: RunInfo) -> None:
        self._path = Path(run.workdir) / "metrics.jsonl"
        self._file = self._open_file(run.step)
        self._output = cast(TextIO, Unread(sys.stderr if is_first() else None))
        self._console = Console(file=self._output)
        self._bar = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._total = run.stages[-1][0]
        self._task = self._bar.add_task(
            "", total=self._total, completed=run.step, stage="", loss="-", speed="", left="-"
        )
        self._time_left = TimeLeft(run.stages, self._clock)
        self._last_line = -math.inf
        self._bar.start()

    def step(self, record: dict) -> None:
        self._write(record)
        left = self._time_left.after(record["step"], record["seconds"])
        shown: dict[str, Any] = {
            "stage": f"{record['length']:,} {record['attention']}",
            "loss": f"{record['loss']:.4f}",
            "speed": "  ".join(
                text.format(record[name]) for name, text in SPEED.items() if name in record
            ),
            "left": _duration(left),
        }
        self._bar.update(self._task, completed=record["step"], **shown)
        if self._bar.disable and (
            self._clock() - self._last_line > PLAIN_SECONDS or record["step"] == self._total
        ):
            self._last_line = self._clock()
            print(
                f"step {record['step']}/{self._total}  {shown['stage']}  loss {shown['loss']}  "
                f"{shown['speed']}  left {shown['left']}",
                file=self._output,
                flush=True,
            )

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "eval": values})
        self.say(
            f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def rollback(self, step: int) -> None:
        """Drops the records of steps after `step`."""
        if is_first():
            self._file.close()
            self._file = self._open_file(step)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def close(self, error: BaseException | None) -> None:
        self._bar.stop()
        self._file.close()

    def _open_file(self, step: int) -> TextIO:
        if is_first():
            _truncate(self._path, step)
        return open(self._path if is_first() else os.devnull, "a", buffering=1, encoding="utf-8")

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(json_safe(record)) + "\n")


class Unread:
    """A text stream that drops its text if the stream below it cannot be written: its reader has
    gone, or the disk of a log is full.

    stream: None if Python found the stream closed.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class TimeLeft:
    """Estimates the seconds to the end of a run.

    A step of the current stage takes the median of its recent steps; a step of a later stage takes
    longer in proportion to its FLOPs. The time between steps (evaluations, saves) stretches the
    rest of the run as it stretched the run so far.

    stages: (last step, FLOPs of a step) of every stage.
    """

    def __init__(self, stages: Sequence[tuple[int, float]], clock: Callable[[], float]):
        self._stages, self._clock = stages, clock
        self._start, self._in_steps = clock(), 0.0
        self._stage = -1
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)

    def after(self, step: int, seconds: float) -> float:
        """The estimate after a `step` that took `seconds`."""
        number = next(i for i, (stop, _) in enumerate(self._stages) if step <= stop)
        if number != self._stage:
            self._stage = number
            self._recent.clear()
        self._recent.append(seconds)
        self._in_steps += seconds
        stop, flops = self._stages[number]
        later = sum(
            (until - start) * more / flops
            for (start, _), (until, more) in itertools.pairwise(self._stages[number:])
        )
        overhead = max(1.0, (self._clock() - self._start) / self._in_steps)
        return overhead * statistics.median(self._recent) * (stop - step + later)


def _truncate(path: Path, step: int) -> None:
    """Drops the records of steps after `step`."""
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
