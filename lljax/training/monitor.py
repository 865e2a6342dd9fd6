"""What a run says of itself while it goes: metrics.jsonl, TensorBoard, and a progress bar."""

import json
import math
import os
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

SPEED = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}  # shown where the record has them
BOARD_EVERY = 10.0                           # seconds until TensorBoard sees what was added
PLAIN_EVERY = 10.0                           # seconds between lines where no terminal shows a bar


class Monitor:
    """Records the steps of a run in `workdir`. On resume at `step`, records of later steps are cut off first.

    Of several processes the first one does; the monitors of the others do nothing.
    """

    def __init__(self, workdir: Path, *, total_steps: int, step: int):
        first = jax.process_index() == 0
        self.path = Path(workdir) / "metrics.jsonl"
        if first:
            _cut(self.path, step)
        self._file = open(self.path if first else os.devnull, "a", buffering=1)
        self._board = _Board(Path(workdir) / "tensorboard", step) if first else None
        self._output = sys.stderr if first else open(os.devnull, "w")
        self._console = Console(file=self._output)
        self._bar = Progress(TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(),
                             TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
                             TextColumn("left"), TimeRemainingColumn(), console=self._console,
                             disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total_steps, completed=step, stage="", loss="-", speed="")
        self._total, self._said, self._started, self._first = total_steps, -math.inf, time.monotonic(), step

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()
        if self._board:
            self._board.close()
        self._file.close()

    def step(self, record: dict) -> None:
        """One optimizer step. `record` has step, stage, length, attention, loss, grad_norm, tokens_per_second ...

        data_seconds: how long the next batch was read, where the device was done before it came; else 0. mfu: model FLOPs a
        second by the peak of the devices, where that is known. load_balancing_loss, expert_load_max: of a model with experts,
        see lljax.training.loss. rollbacks: with the first step after a rollback, each that went back to the step before it.
        """
        self._write(record)
        if self._board:
            self._board.add(record["step"], {f"train/{name}": value for name, value in record.items()
                                             if isinstance(value, (int, float)) and name != "step"})
        shown = {"loss": f"{record['loss']:.4f}",
                 "speed": "  ".join(text.format(record[name]) for name, text in SPEED.items() if name in record)}
        stage = f"{record['length']:,} {record['attention']}"
        self._bar.update(self._task, completed=record["step"], stage=stage, **shown)
        if self._bar.disable and (time.monotonic() - self._said > PLAIN_EVERY or record["step"] == self._total):
            self._said = time.monotonic()
            done = record["step"] - self._first
            left = (self._said - self._started) / done * (self._total - record["step"])
            print(f"step {record['step']}/{self._total}  {stage}  loss {shown['loss']}  "
                  f"{shown['speed']}  left {_duration(left)}", file=self._output, flush=True)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "eval": values})
        if self._board:
            self._board.add(step, {f"eval/{name}": value for name, value in values.items()})
        self.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def roll_back(self, step: int) -> None:
        """Drops the records of steps after `step`, to which the run goes back."""
        self._started, self._first = time.monotonic(), step
        if jax.process_index() == 0:
            self._file.close()
            _cut(self.path, step)
            self._file = open(self.path, "a", buffering=1)
            self._board.restart(step)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(_finite(record)) + "\n")


class _Board:
    """TensorBoard's file, which shows nothing after `step` of the files before it. Written in the thread that adds to it: that
    of tensorboardX's SummaryWriter ends where the disk is full, and leaves a run that waits for it without end."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._events, self._flushed = EventsWriter(str(folder / "events")), -math.inf
        self._events.write_event(Event(step=step + 1, file_version="brain.Event:2"))
        self.restart(step)

    def restart(self, step: int) -> None:
        """TensorBoard then forgets what it has of steps after `step`."""
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > BOARD_EVERY:
            self._flushed = time.monotonic()
            self._events.flush()

    def close(self) -> None:
        self._events.close()


def _finite(value):
    """JSON has no NaN: a number that is not finite becomes its name."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl in order; a last line cut short by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _cut(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, so that a resumed run's file equals an uninterrupted one's."""
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(unfinished, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
