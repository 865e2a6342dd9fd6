"""Imported first: a signal that asks a run to stop ends it with its exit code also while it
imports, which takes seconds, and when it is done; and what is said to a log that was closed goes
nowhere, and not into the file that is opened next.
"""

import contextlib
import os
import signal

with contextlib.suppress(OSError):
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest number that is free
        pass
    os.close(opened)


def _leave(number, _) -> None:
    with contextlib.suppress(OSError):  # of a terminal that was closed
        name = signal.Signals(number).name
        os.write(
            2,
            f"Stopped: {name} before the first step or after the last: nothing to save\n".encode(),
        )
    os._exit(75)  # an exception might be caught by what it happens to meet


for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    # nohup has SIGHUP ignored
    if each == signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN:
        signal.signal(each, _leave)
