"""Ends a run in which nothing moves any more, and shows where every thread hangs."""

import faulthandler
import os
import threading
from collections.abc import Callable

from lljax.errors import STDERR, Stalled, exit_now
from lljax.run.observer import Observer, RunInfo

TICKS = 20  # without a heartbeat
LAST_WORDS = 10.0  # seconds for the message, in case that hangs too


class Watchdog(Observer):
    """Ends the process if no heartbeat came for `alarm.stall_minutes`; 0: never.

    A thread counts ticks of a monotonic clock. It does not need the main thread, which may hang in
    C, and a process that was suspended has missed one tick, not more. (C code that keeps Python's
    lock stops the thread as well; jax releases the lock wherever it waits.) Every process of a run
    has its own watchdog.

    seconds: in place of alarm.stall_minutes. last_words: seconds after which the process ends even
      if its message could not be written. wait: (seconds) -> whether the run is over, in place of
      waiting that long for its end.
    """

    def __init__(
        self,
        seconds: float | None = None,
        last_words: float = LAST_WORDS,
        wait: Callable[[float], bool] | None = None,
    ):
        self._seconds, self._last_words = seconds, last_words
        self._heard, self._over = threading.Event(), threading.Event()
        self._wait = wait or self._over.wait
        self._thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def open(self, run: RunInfo) -> None:
        self._step, self._last_checkpoint = run.step, run.last_checkpoint
        if self._seconds is None:
            self._seconds = 60.0 * run.config.alarm.stall_minutes
        if self._seconds:
            self._thread.start()

    def heartbeat(self, step: int) -> None:
        self._step = step
        self._heard.set()

    def close(self, error: BaseException | None) -> None:
        self._over.set()

    def watch(self) -> None:
        """The work of the thread: returns at the end of the run, or ends the process."""
        assert self._seconds is not None, "open() sets it"
        silent = 0
        while silent < TICKS:
            if self._wait(self._seconds / TICKS):
                return
            silent = 0 if self._heard.is_set() else silent + 1
            self._heard.clear()
        self.end(self._seconds / 60)

    def end(self, minutes: float) -> None:
        """Ends the process with the stacks of all threads and one line."""
        threading.Timer(self._last_words, os._exit, [Stalled.exit_code]).start()
        faulthandler.dump_traceback(STDERR)
        exit_now(
            Stalled.exit_code,
            f"{Stalled.__name__}: nothing was finished for {minutes:g} minutes "
            f"(alarm.stall_minutes) after step {self._step}, the lines above show where it hangs; "
            f"the same command goes on after step {self._last_checkpoint() or 0}, the last that is "
            "saved; raise alarm.stall_minutes if it was merely slow",
        )
