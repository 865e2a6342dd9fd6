"""One run at a time in a folder: an operating-system lock, which a process that dies cannot leave
behind.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from lljax.errors import ConfigError, printable
from lljax.parallel.processes import from_all, is_first

# errors of a file system without locks
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


class Lock:
    """`workdir`/lock, held by the first process of a run. A link in its place is not followed."""

    def __init__(self, workdir: Path):
        self.path = workdir / "lock"
        self._held: int | None = None  # file descriptor

    def take(self) -> str:
        """Locks the file; returns the reason if it cannot, else an empty text.

        The file stays; the lock goes with the process, however it ends. On a file system without
        locks there is a warning.
        """
        try:
            # O_NONBLOCK: opening a pipe in its place would wait for a reader
            held = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "its file lock is a link: delete that"
            reason = (error.strerror or str(error)).lower()
            return f"nothing can be written there ({reason}): mend the folder, or name another"
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = printable(os.pread(held, 200, 0).decode(errors="replace").strip())
            os.close(held)
            return (
                f"{holder or 'another process'} trains there: wait for its end, or stop it "
                "(SIGTERM saves), or name another folder"
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(held)
                raise
            logging.warning(
                "%s: this file system has no locks (%s): nothing keeps a second run out",
                self.path.parent,
                error.strerror,
            )
        status = os.fstat(held)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(held)
            return "its file lock is no file of its own: delete that"
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self.release()  # the lock on a file that was deleted
        self._held = held
        return ""

    def check(self) -> None:
        """Checks that the lock still belongs to this run; locks again if the file was deleted.

        Raises:
          ConfigError: another run has the folder; raised in every process of this run.
        """
        refusal = "" if not is_first() or self._is_there() else self.take()
        if refusal := from_all(refusal)[0]:
            raise ConfigError(
                f"--workdir={self.path.parent}: its file lock was deleted or replaced while this "
                f"run went on, and {refusal}; this run leaves the folder and saves nothing more"
            )

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _is_there(self) -> bool:
        assert self._held is not None, "the first process holds the lock"
        try:
            there, held = os.stat(self.path, follow_symlinks=False), os.fstat(self._held)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Lock]:
    """A context in which no other run trains in `workdir`: the first process of this run holds the
    `Lock`. Readers of the folder need no lock.

    Raises:
      ConfigError: another run holds it; raised in every process of this run.
    """
    lock = Lock(workdir)
    try:
        if refusal := from_all(lock.take() if is_first() else "")[0]:
            raise ConfigError(f"--workdir={workdir}: {refusal}")
        yield lock
    finally:
        lock.release()
