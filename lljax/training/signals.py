"""SIGTERM and Ctrl-C: asked to stop, a run saves and leaves, all of its processes after the same step."""

import signal
import threading

from lljax.distributed import any_of
from lljax.errors import Stopped


class _Now(SystemExit):
    """Passes the `except Exception` of libraries, and of ours that take any exception for damage."""


class StopRequest:
    """A context in which SIGTERM and SIGINT do not kill. `agreed()` is what the loop polls between steps.

    Until `defer()` is called there is nothing to save and a signal raises `Stopped` at once. A second Ctrl-C while
    saving is taken at its word.
    """

    def __init__(self):
        self.requested = False
        self._deferred = False

    def defer(self) -> None:
        self._deferred = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        return any_of(self.requested)

    def __enter__(self):
        # Python gives signals to the main thread only: elsewhere (a notebook's worker, a server) they stay as they are.
        main = threading.current_thread() is threading.main_thread()
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT) if main}
        return self

    def __exit__(self, kind, error, _):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is _Now:
            raise Stopped(str(error)) from None

    def _receive(self, number, frame):
        if not self._deferred:
            self.requested = True            # where Python drops the exception: in a callback, in a __del__
            raise _Now(f"{signal.Signals(number).name} before the first step: nothing to save")
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
