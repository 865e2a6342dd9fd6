"""Errors that a user can act on: one line with the fault, its place, and the way out."""

import contextlib
import errno
import io
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

STDERR = 2  # the file descriptor, whatever sys.stderr is
SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # clears a progress bar, which hides the cursor


class LljaxError(Exception):
    """Base of all errors that are reported without a traceback. `exit_code`: of the process."""

    exit_code = 1


class ConfigError(LljaxError):
    """A field, a combination of fields, or a path named in the configuration cannot be used."""

    exit_code = 2


class ModelError(ConfigError):
    """The base model, the tokenizer or an adapter cannot be read, or is not of the claimed form."""


class DataError(LljaxError):
    """The training or evaluation documents cannot be used."""

    exit_code = 3


class PeerLost(LljaxError):
    """Another process of the run has ended or does not answer.

    The same command resumes from the last checkpoint.
    """

    exit_code = 69


class NumericAbort(LljaxError):
    """Too many steps in a row had an unusable gradient; the last good state was saved."""

    exit_code = 70


class OutOfMemory(LljaxError):
    """A device ran out of memory; the last checkpoint is unchanged."""

    exit_code = 71


class Stalled(LljaxError):
    """No step finished for too long. Never raised: the watchdog (lljax/run/watchdog.py) ends the
    process with this exit code.
    """

    exit_code = 74


class Stopped(LljaxError):
    """SIGTERM, SIGHUP or Ctrl-C arrived; the state was saved and the same command resumes."""

    exit_code = 75


class _Short(reprlib.Repr):
    """A repr that never builds more text than it returns, and prints integers of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 4

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 200 else f"<an integer of {x.bit_length():,} bits>"


def short(value: Any) -> str:
    """`repr(value)` for an error message: one line of bounded length, in bounded time."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = _Short()

# How Python, Rust and numpy report a full disk, or that a quota or the limit of a file's size is
# reached.
DISK_FULL = re.compile(
    "|".join(
        [
            *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
            r"\d+ requested and \d+ written",
        ]
    )
)


@contextlib.contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turns an `LljaxError`, and a full disk, into one line on stderr and an exit code. For the
    `main` of a command.

    Characters that the terminal's encoding lacks are written as escapes from here on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have replaced it
            with contextlib.suppress(ValueError):  # closed
                stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except LljaxError as error:
        _say(f"{type(error).__name__}: {printable(str(error))}")
        sys.exit(error.exit_code)
    except BaseException as error:
        text = next(iter(str(error).splitlines()), "")
        # Raised by Rust, and no Exception: a tokenizer's rules fail on a text.
        if type(error).__name__ == "PanicException":
            _say(f"ModelError: the tokenizer fails on a text ({printable(text)[:200]})")
            sys.exit(ModelError.exit_code)
        if not isinstance(error, Exception) or not DISK_FULL.search(text):
            raise
        _say(f"DiskError: {printable(text)}: make room and give the same command again")
        sys.exit(LljaxError.exit_code)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr)
    except OSError:  # the reader is gone: Python would try again at exit, and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)


def print_now(line: str) -> None:
    """Writes a line to stderr from any thread, at once; ignored if the reader is gone."""
    start = SHOW_CURSOR if os.isatty(STDERR) else ""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"{start}{line}\n".encode(errors="backslashreplace"))


def exit_now(code: int, line: str) -> NoReturn:
    """Prints `line` and ends the process from any thread, whatever the other threads wait for."""
    print_now(line)
    os._exit(code)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, printable; or its class."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return printable(line.strip()) or type(error).__name__


def counted(number: int, noun: str) -> str:
    """The number and the noun: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """`text` with line breaks, terminal codes and lone surrogates as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
