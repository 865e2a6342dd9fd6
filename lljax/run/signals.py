"""SIGTERM, SIGHUP and Ctrl-C: asked to stop, a run saves and leaves, all of its processes after the
same step.
"""

import os
import signal
import threading
from collections.abc import Callable

from lljax.errors import Stopped, leave, say
from lljax.parallel.processes import any_of, is_script

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
GRACE = 5.0  # seconds for a main thread that may be inside of C, where no exception reaches it
_listening = []  # the StopRequests that are entered


def _as_any_process() -> None:
    """For a child that is forked meanwhile: it ends by a signal, of which the run hears nothing."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_as_any_process)


class _Now(SystemExit):
    """Passes the `except Exception` of libraries, and of ours that take any exception for
    damage.
    """


class StopRequest:
    """A context in which SIGTERM, SIGHUP (its terminal was closed) and SIGINT (Ctrl-C) do not kill.
    `agreed()` is what the loop polls between steps.

    Until `defer()` is called there is nothing to save and a signal raises `Stopped` at once. After
    it the first signal is said at once, and a second Ctrl-C ends the process of a script; in
    another it raises KeyboardInterrupt.

    A thread of its own does the saying and the ending: Python gives a signal to the main thread,
      which may be inside of a step or a compiler for minutes, but writes its number into a pipe at
      once.
    """

    def __init__(self):
        self.requested = False
        self._deferred, self._last_checkpoint = False, None
        self._over = threading.Event()

    def defer(self, last_checkpoint: Callable[[], int | None]) -> None:
        """last_checkpoint() -> the step of the newest checkpoint, or None."""
        self._deferred, self._last_checkpoint = True, last_checkpoint

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        return any_of(self.requested)

    def __enter__(self):
        self._previous = {}
        # Python gives signals to the main thread only: elsewhere (a notebook's worker, a server)
        # they stay as they are.
        if threading.current_thread() is not threading.main_thread():
            return self
        # as nohup asks
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        _listening.append(self)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in STOPPING
            if number not in ignored
        }
        return self

    def __exit__(self, kind, error, _):
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            _listening.remove(self)
            self._over.set()
            os.write(self._write, b"\0")
            self._listener.join()
            os.close(self._read)
            os.close(self._write)
        if kind is _Now:
            raise Stopped(str(error)) from None

    def _receive(self, number, frame):
        # also where Python drops the exception: in a callback
        again, self.requested = self.requested, True
        if not self._deferred:
            raise _Now(f"{signal.Signals(number).name} before the first step: nothing to save")
        if again and number == signal.SIGINT and not is_script():
            raise KeyboardInterrupt

    def _listen(self) -> None:
        told = False
        while not self._over.is_set():
            for number in os.read(self._read, 64):
                if number in STOPPING:
                    self._heard(signal.Signals(number), told)
                    told = True

    def _heard(self, number: signal.Signals, told: bool) -> None:
        if not self._deferred:
            if not self._over.wait(GRACE) and not self._deferred and is_script():
                leave(
                    Stopped.exit_code,
                    f"Stopped: {number.name} before the first step: nothing to save",
                )
        elif told and number == signal.SIGINT and is_script():
            leave(
                Stopped.exit_code,
                "Stopped: by a second Ctrl-C, without saving: the same command goes on after step "
                f"{self._last_checkpoint() or 0}, the last that is saved",
            )
        elif not told:
            more = (
                "; a second Ctrl-C stops it now, without saving" if number == signal.SIGINT else ""
            )
            say(f"{number.name}: the run saves and stops after this step{more}")
