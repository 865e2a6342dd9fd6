"""One run at a time in a folder: a lock of the operating system, which a process that dies cannot
leave behind.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from pathlib import Path

from lljax.errors import ConfigError, printable
from lljax.parallel.processes import first, from_all

# of a file system that has none
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


class Lock:
    """`workdir`/lock, held by the first process of a run. A link in its place is not followed."""

    def __init__(self, workdir: Path):
        self.path, self._held = workdir / "lock", None

    def take(self) -> str:
        """Holds the file, or returns why not.

        The file stays, the lock goes with the process, however it ends. Where the file system has
        no locks: a warning.
        """
        try:
            # O_NONBLOCK: a pipe in its place would be waited for.
            held = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "its file lock is a link: delete that"
            return f"nothing can be written there ({error.strerror.lower()}): mend the folder, or name another"
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                printable(os.pread(held, 200, 0).decode(errors="replace").strip())
                or "another process"
            )
            os.close(held)
            return f"{holder} trains there: wait for its end, or stop it (SIGTERM saves), or name another folder"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(held)
                raise
            logging.warning(
                "%s: this file system has no locks (%s): nothing keeps a second run out",
                self.path.parent,
                error.strerror,
            )
        found = os.fstat(held)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(held)
            return "its file lock is no file of its own: delete that"
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self.release()  # of a file that was deleted
        self._held = held
        return ""

    def check(self) -> None:
        """Sees that the file is still the one that is held; where it was deleted and nobody has
        made another, makes it again.

        Raises:
          ConfigError: another run has the folder, in every process of this one.
        """
        refusal = "" if not first() or self._is_there() else self.take()
        if refusal := from_all(refusal)[0]:
            raise ConfigError(
                f"--workdir={self.path.parent}: its file lock was deleted or replaced while this run went on, "
                f"and {refusal}; this run leaves the folder and saves nothing more"
            )

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _is_there(self) -> bool:
        try:
            here, held = os.stat(self.path, follow_symlinks=False), os.fstat(self._held)
        except FileNotFoundError:
            return False
        return (here.st_dev, here.st_ino) == (held.st_dev, held.st_ino)


@contextlib.contextmanager
def locked(workdir: Path):
    """A context in which no other run trains in `workdir`: the first process of this one holds the
    `Lock` that it gives. Who only reads the folder takes none.

    Raises:
      ConfigError: another run holds it, in every process of this one.
    """
    lock = Lock(workdir)
    try:
        if refusal := from_all(lock.take() if first() else "")[0]:
            raise ConfigError(f"--workdir={workdir}: {refusal}")
        yield lock
    finally:
        lock.release()
