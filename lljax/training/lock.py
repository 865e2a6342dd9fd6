"""One run at a time in a folder: a lock of the operating system, which a process that dies cannot leave behind."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from lljax.distributed import first, from_all
from lljax.errors import ConfigError

NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)     # of a file system that has none


@contextlib.contextmanager
def locked(workdir: Path):
    """A context in which no other run trains in `workdir`: the first process of this one holds `workdir`/lock.

    The file stays, the lock goes with the process, however it ends. Who only reads the folder takes no lock. Where the file
    system has no locks: a warning.

    Raises:
      ConfigError: another run holds it, in every process of this one.
    """
    with contextlib.ExitStack() as held:
        refusal = _take(workdir, held) if first() else ""
        if refusal := from_all(refusal)[0]:
            raise ConfigError(f"--workdir={workdir}: {refusal}")
        yield


def _take(workdir: Path, held: contextlib.ExitStack) -> str:
    """Puts the lock into `held`, or returns why not."""
    try:
        file = held.enter_context(open(workdir / "lock", "a+"))
    except OSError as error:
        return f"nothing can be written there ({error.strerror.lower()}): mend the folder, or name another"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        return f"{holder} trains there: wait for its end, or stop it (SIGTERM saves), or name another folder"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logging.warning("%s: this file system has no locks (%s): nothing keeps a second run out", workdir, error.strerror)
        return ""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""
