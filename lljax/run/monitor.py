"""What a run says of itself while it goes: metrics.jsonl, TensorBoard, and a progress bar."""

import collections
import contextlib
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lljax.data.files import atomic_write
from lljax.errors import first_line
from lljax.report.records import _finite, read_metrics

# shown where the record has them
SPEED = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}
BOARD_EVERY = 10.0  # seconds until TensorBoard sees what was added
PLAIN_EVERY = 10.0  # seconds between lines where no terminal shows a bar
RECENT = 32  # steps whose seconds say how long the next ones take


class Monitor:
    """Records the steps of a run in `workdir`. On resume at `step`, records of later steps are cut
    off first.

    Of several processes the first one does; the monitors of the others do nothing. What nobody
    reads (a closed terminal, a pipe whose reader has gone) and what TensorBoard's file has no room
    for stop no run; metrics.jsonl must be written.

    stages: (its last step, the FLOPs of one of its steps) of every stage of the run, from which the
      time left is told.
    """

    def __init__(self, workdir: Path, *, stages: Sequence[tuple[int, float]], step: int):
        first = jax.process_index() == 0
        self.path = Path(workdir) / "metrics.jsonl"
        if first:
            _cut(self.path, step)
        self._file = open(self.path if first else os.devnull, "a", buffering=1, encoding="utf-8")
        self._board = _Board(Path(workdir) / "tensorboard", step) if first else None
        self._output = Unread(sys.stderr) if first else open(os.devnull, "w")
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
        self._total = stages[-1][0]
        self._task = self._bar.add_task(
            "", total=self._total, completed=step, stage="", loss="-", speed="", left="-"
        )
        self._left, self._said = _TimeLeft(stages), -math.inf

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()
        if self._board:
            self._board.close()
        self._file.close()

    def step(self, record: dict) -> None:
        """One optimizer step. `record` has step, stage, length, attention, loss, grad_norm,
        tokens_per_second ...

        data_seconds: how long the next batch was read, where the device was done before it came;
          else 0. mfu: model FLOPs a second by the peak of the devices, where that is known.
          load_balancing_loss, expert_load_max: of a model with experts, see
          lljax.objectives.token_loss. rollbacks: with the first step after a rollback, each that
          went back to the step before it.
        """
        self._write(record)
        if self._board:
            self._board.add(
                record["step"],
                {
                    f"train/{name}": value
                    for name, value in record.items()
                    if isinstance(value, (int, float)) and name != "step"
                },
            )
        shown = {
            "loss": f"{record['loss']:.4f}",
            "speed": "  ".join(
                text.format(record[name]) for name, text in SPEED.items() if name in record
            ),
        }
        shown |= {
            "stage": f"{record['length']:,} {record['attention']}",
            "left": _duration(self._left.after(record["step"], record["seconds"])),
        }
        self._bar.update(self._task, completed=record["step"], **shown)
        if self._bar.disable and (
            time.monotonic() - self._said > PLAIN_EVERY or record["step"] == self._total
        ):
            self._said = time.monotonic()
            print(
                f"step {record['step']}/{self._total}  {shown['stage']}  loss {shown['loss']}  "
                f"{shown['speed']}  left {shown['left']}",
                file=self._output,
                flush=True,
            )

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "eval": values})
        if self._board:
            self._board.add(step, {f"eval/{name}": value for name, value in values.items()})
        self.say(
            f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def roll_back(self, step: int) -> None:
        """Drops the records of steps after `step`, to which the run goes back."""
        if jax.process_index() == 0:
            self._file.close()
            _cut(self.path, step)
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")
            self._board.restart(step)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(_finite(record)) + "\n")


class Unread:
    """A text stream over another that goes on in silence where that cannot be written: nobody reads
    it any more, or the disk of a log is full. stream: None where Python found it closed.
    """

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")

    def __getattr__(self, attribute):
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _TimeLeft:
    """Seconds to the end of a run: its steps, of which each stage has its own kind, and what comes
    between them.

    A step of the stage that goes on takes what its recent ones took; one of a later stage as much
    more as it has more FLOPs. Evaluations and saves lengthen what is left as they lengthened what
    is done.
    """

    def __init__(self, stages: Sequence[tuple[int, float]]):
        self._stages, self._stage = stages, None
        self._began, self._stepping = time.monotonic(), 0.0

    def after(self, step: int, seconds: float) -> float:
        """After a step that took so many seconds."""
        number = next(i for i, (stop, _) in enumerate(self._stages) if step <= stop)
        if number != self._stage:
            self._stage, self._recent = number, collections.deque(maxlen=RECENT)
        self._recent.append(seconds)
        self._stepping += seconds
        (stop, flops), each = self._stages[number], statistics.median(self._recent)
        later = sum(
            (until - start) * more / flops
            for (start, _), (until, more) in zip(self._stages[number:], self._stages[number + 1 :])
        )
        return (
            max(1.0, (time.monotonic() - self._began) / self._stepping)
            * each
            * (stop - step + later)
        )


class _Board:
    """TensorBoard's file, which shows nothing after `step` of the files before it. Written in the
    thread that adds to it: that of tensorboardX's SummaryWriter ends where the disk is full, and
    leaves a run that waits for it without end. Where it cannot be written, a warning, and no more
    of it.
    """

    def __init__(self, folder: Path, step: int):
        self._events, self._flushed = None, -math.inf
        with self._or_no_more():
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
        self._write(Event(step=step + 1, file_version="brain.Event:2"))
        self.restart(step)

    def restart(self, step: int) -> None:
        """TensorBoard then forgets what it has of steps after `step`."""
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if self._events and time.monotonic() - self._flushed > BOARD_EVERY:
            self._flushed = time.monotonic()
            with self._or_no_more():
                self._events.flush()

    def close(self) -> None:
        if self._events:
            with self._or_no_more():
                self._events.close()

    def _write(self, event: Event) -> None:
        if self._events:
            with self._or_no_more():
                self._events.write_event(event)

    @contextlib.contextmanager
    def _or_no_more(self):
        try:
            yield
        except OSError as error:
            logging.warning(
                "tensorboard: nothing more is written there until the run is started again (%s)",
                first_line(error),
            )
            self._events = None


def _cut(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, so that a resumed run's file equals an uninterrupted
    one's.
    """
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
