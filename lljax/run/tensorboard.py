"""Writes the metrics of a run for TensorBoard."""

import contextlib
import logging
import math
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto import event_pb2, summary_pb2

from lljax.errors import first_line
from lljax.parallel.processes import is_first
from lljax.run.observer import Observer, RunInfo

# Protobuf fills these modules when they are imported: type checkers see nothing in them.
EVENT: Any = event_pb2
SUMMARY: Any = summary_pb2
FLUSH_SECONDS = 10.0  # until TensorBoard sees new values
ILLEGAL_IN_A_TAG = re.compile(r"[^-/\w.]")


class TensorBoard(Observer):
    """Adds train/* after every step and eval/* after every evaluation to `workdir`/tensorboard.

    On resume TensorBoard drops the later steps of earlier files: a session start purges them.

    Events are written in the calling thread. The thread of tensorboardX's SummaryWriter ends when
    the disk is full, and a run that closes it would wait forever. If the file cannot be written,
    there is a warning and the run goes on without it.

    open_file: (path) -> a writer of records, for tests.
    """

    def __init__(self, open_file: Callable[[str], RecordWriter] = RecordWriter):
        self._open_file = open_file
        self._file: RecordWriter | None = None
        self._flushed = -math.inf

    def open(self, run: RunInfo) -> None:
        if not is_first():
            return
        folder = Path(run.workdir) / "tensorboard"
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        with self._or_stop():
            folder.mkdir(exist_ok=True)
            self._file = self._open_file(str(folder / name))
        self._write(EVENT.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(EVENT.Event(step=run.step + 1, file_version="brain.Event:2"))
        self.rollback(run.step)

    def step(self, record: dict) -> None:
        numbers = {
            f"train/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._add(record["step"], numbers)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._add(step, {f"eval/{name}": value for name, value in values.items()})

    def rollback(self, step: int) -> None:
        """Makes TensorBoard drop the values of steps after `step`."""
        self._write(
            EVENT.Event(step=step + 1, session_log=EVENT.SessionLog(status=EVENT.SessionLog.START))
        )

    def close(self, error: BaseException | None) -> None:
        with self._or_stop():
            if self._file:
                self._file.flush()
                self._file.close()

    def _add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            tag = ILLEGAL_IN_A_TAG.sub("_", name)
            summary = SUMMARY.Summary(value=[SUMMARY.Summary.Value(tag=tag, simple_value=value)])
            self._write(EVENT.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flushed = time.monotonic()
            with self._or_stop():
                if self._file:
                    self._file.flush()

    def _write(self, event: Any) -> None:
        with self._or_stop():
            if self._file:
                self._file.write(event.SerializeToString())

    @contextlib.contextmanager
    def _or_stop(self):
        """Stops writing, with a warning, at the first OSError."""
        try:
            yield
        except OSError as error:
            logging.warning(
                "tensorboard: nothing more is written there until the run is started again (%s)",
                first_line(error),
            )
            self._file = None
