"""A run in which nothing moves any more ends itself, and shows where each thread was."""

import faulthandler
import os
import threading
from collections.abc import Callable

from lljax.errors import STDERR, Stalled, leave

TICKS = 20  # of silence
LAST_WORDS = 10.0  # seconds to say them, where even that hangs


class Watchdog:
    """A context that ends the process when `alive` was not called for `seconds`; 0: never.

    A thread of its own counts ticks of a monotonic clock: it does not need the main thread, which
      may hang in C, and a process that was suspended has missed a tick, not more. (C code that
      keeps Python's own lock stops it too; jax keeps it nowhere that it waits.) Each process of a
      run has its own.

    step: the last one that is done. last_checkpoint() -> the step of the newest checkpoint, or
      None.
    """

    def __init__(self, seconds: float, *, step: int, last_checkpoint: Callable[[], int | None]):
        self._seconds, self._step, self._last_checkpoint = seconds, step, last_checkpoint
        self._heard, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def alive(self, step: int) -> None:
        """Says that something was finished: a step, a batch or an example of an evaluation, a
        save.
        """
        self._step = step
        self._heard.set()

    def _watch(self) -> None:
        silent = 0
        while silent < TICKS:
            if self._over.wait(self._seconds / TICKS):
                return
            silent = 0 if self._heard.is_set() else silent + 1
            self._heard.clear()
        threading.Timer(LAST_WORDS, os._exit, [Stalled.exit_code]).start()
        faulthandler.dump_traceback(STDERR)
        leave(
            Stalled.exit_code,
            (
                f"{Stalled.__name__}: nothing was finished for {self._seconds / 60:g} minutes (alarm.stall_minutes) after step "
                f"{self._step}, the lines above show where it hangs; the same command goes on after step "
                f"{self._last_checkpoint() or 0}, the last that is saved; raise alarm.stall_minutes if it was merely slow"
            ),
        )
