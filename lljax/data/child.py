"""A child process that runs third-party code: it answers requests over pipes, in bounded time."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

HEADER = 8  # bytes with the length of what follows


class ChildEnded(Exception):
    """The process ended instead of answering. code: as `Popen.returncode`."""

    def __init__(self, code: int):
        super().__init__(f"exit {code}")
        self.code = code


class Child:
    """A started process. It reads requests from stdin and answers on stdout; both are 8 bytes of
    length, then the content. It ends with its input, hence with this process.

    It leads a session of its own: signals to the process group of a run do not reach it, and `stop`
    ends the processes it started too.
    """

    def __init__(self, command: Sequence[Any], **options: Any):
        """options: of `subprocess.Popen`. Raises OSError if the process cannot be started."""
        self.popen: Any = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            **options,
        )

    def ask(self, request: bytes, seconds: float) -> bytes:
        """The answer to `request`. After any exception, interrupts too, the process must be
        stopped: the next call would read this answer.

        Raises:
          TimeoutError: there is none within `seconds`.
          ChildEnded: there will be none.
        """
        until = time.monotonic() + seconds
        send = memoryview(len(request).to_bytes(HEADER) + request)
        os.set_blocking(self.popen.stdin.fileno(), False)
        while send:
            _wait(self.popen.stdin, select.POLLOUT, until)
            try:
                send = send[os.write(self.popen.stdin.fileno(), send) :]
            except BrokenPipeError:
                raise ChildEnded(self.stop()) from None
        return self._read(int.from_bytes(self._read(HEADER, until)), until)

    def idle(self) -> bool:
        """Whether the process is there, with no answer to read."""
        poll = select.poll()
        poll.register(self.popen.stdout, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        """Kills the process and those it started; from any thread, during `ask` of another one."""
        if self.popen.returncode is None:  # not yet waited for, so that its number is still its own
            with contextlib.suppress(OSError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.popen.kill()

    def stop(self) -> int:
        """Kills the process, closes its pipes and returns its exit code."""
        self.kill()
        with contextlib.suppress(OSError):
            self.popen.stdin.close()
        self.popen.stdout.close()
        return self.popen.wait()

    def _read(self, size: int, until: float) -> bytes:
        parts = []
        while size:
            _wait(self.popen.stdout, select.POLLIN, until)
            part = os.read(self.popen.stdout.fileno(), min(size, 1 << 20))
            if not part:
                raise ChildEnded(self.stop())
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _wait(pipe: Any, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(1000 * max(0.0, until - time.monotonic())):
        raise TimeoutError
