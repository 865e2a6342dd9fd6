"""SIGTERM, SIGHUP and Ctrl-C ask a run to stop: it saves and ends, all its processes after the same
step.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from lljax.errors import Stopped, exit_now, print_now
from lljax.parallel.processes import any_of, is_script

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
GRACE = 5.0  # seconds for a main thread that may be in C, which no exception reaches
_entered = []  # the StopRequests that are entered


def _restore_defaults() -> None:
    """In a forked child: a signal ends the child, and the run hears nothing of it."""
    if _entered:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_restore_defaults)


class _Now(SystemExit):
    """Passes every `except Exception`, in libraries and in lljax."""


class StopRequest:
    """A context in which SIGTERM, SIGHUP (the terminal was closed) and SIGINT (Ctrl-C) do not kill.
    The loop polls `agreed()` between steps.

    Before `defer()` there is nothing to save, and a signal raises `Stopped` at once. After it the
    first signal is acknowledged at once, and a second Ctrl-C ends the process of a script; in other
    processes it raises KeyboardInterrupt.

    A thread of its own prints the acknowledgment and ends the process: Python runs signal handlers
    in the main thread, which may be in a step or a compiler for minutes, but writes the number of
    the signal into a pipe at once.

    grace: seconds after which a signal before `defer()` ends a main thread that hangs in C.
    """

    def __init__(self, grace: float = GRACE):
        self.requested = False
        self._grace, self._deferred = grace, False
        self._last_checkpoint: Callable[[], int | None] = lambda: None
        self._over = threading.Event()

    def defer(self, last_checkpoint: Callable[[], int | None]) -> None:
        """last_checkpoint() -> the step of the newest checkpoint, or None."""
        self._deferred, self._last_checkpoint = True, last_checkpoint

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        return any_of(self.requested)

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        # Python delivers signals to the main thread only. In other threads (a notebook's worker, a
        # server) the handlers stay as they are.
        if threading.current_thread() is not threading.main_thread():
            return self
        # nohup ignores SIGHUP: it stays ignored
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        _entered.append(self)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in STOPPING
            if number not in ignored
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            _entered.remove(self)
            self._over.set()
            os.write(self._write, b"\0")
            self._listener.join()
            os.close(self._read)
            os.close(self._write)
        if kind is _Now:
            raise Stopped(str(error)) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Set first: Python drops an exception that is raised in a callback.
        again, self.requested = self.requested, True
        if not self._deferred:
            raise _Now(f"{signal.Signals(number).name} before the first step: nothing to save")
        if again and number == signal.SIGINT and not is_script():
            raise KeyboardInterrupt

    def _listen(self) -> None:
        acknowledged = False
        while not self._over.is_set():
            for number in os.read(self._read, 64):
                if number in STOPPING:
                    self._acknowledge(signal.Signals(number), acknowledged)
                    acknowledged = True

    def _acknowledge(self, number: signal.Signals, again: bool) -> None:
        if not self._deferred:
            if not self._over.wait(self._grace) and not self._deferred and is_script():
                exit_now(
                    Stopped.exit_code,
                    f"Stopped: {number.name} before the first step: nothing to save",
                )
        elif again and number == signal.SIGINT and is_script():
            exit_now(
                Stopped.exit_code,
                "Stopped: by a second Ctrl-C, without saving: the same command goes on after step "
                f"{self._last_checkpoint() or 0}, the last that is saved",
            )
        elif not again:
            hint = (
                "; a second Ctrl-C stops it now, without saving" if number == signal.SIGINT else ""
            )
            print_now(f"{number.name}: the run saves and stops after this step{hint}")
