"""Errors a user can act on. Each is one line: what was wrong, where, and what to do."""

import contextlib
import errno
import os
import re
import reprlib
import sys
from typing import NoReturn

STDERR = 2  # the file, whatever sys.stderr is
SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # in place of a progress bar, which hides it


class LljaxError(Exception):
    """Base of all errors that are reported without a traceback; `exit_code` is what the process
    returns.
    """

    exit_code = 1


class ConfigError(LljaxError):
    """A field, a combination of fields, or a path named in the configuration cannot be used."""

    exit_code = 2


class ModelError(ConfigError):
    """The base model, the tokenizer or an adapter cannot be read as what it claims to be."""


class DataError(LljaxError):
    """The training or evaluation documents cannot be used."""

    exit_code = 3


class PeerLost(LljaxError):
    """Another process of the run has ended or does not answer; the same command resumes from the
    last checkpoint.
    """

    exit_code = 69


class NumericAbort(LljaxError):
    """Too many steps in a row had an unusable gradient; the last good state was saved."""

    exit_code = 70


class OutOfMemory(LljaxError):
    """A device had no memory for what was asked of it; the last checkpoint is as it was."""

    exit_code = 71


class Stalled(LljaxError):
    """Nothing moved for too long. Never raised: the process ends itself (lljax.run.watchdog) with
    this exit code.
    """

    exit_code = 74


class Stopped(LljaxError):
    """SIGTERM, SIGHUP or Ctrl-C arrived; the state was saved and the same command resumes."""

    exit_code = 75


class _Short(reprlib.Repr):
    """A repr that never builds more text than it returns, and prints integers of any size."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 4

    def repr_int(self, x, level):
        return repr(x) if x.bit_length() <= 200 else f"<an integer of {x.bit_length():,} bits>"


def short(value) -> str:
    """`repr(value)` for an error message: one line of bounded length, in bounded time."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = _Short()

# How Python, Rust and numpy say that a disk is full, or a quota or a limit of the size of files
# reached.
FULL = re.compile(
    "|".join(
        [
            *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
            r"\d+ requested and \d+ written",
        ]
    )
)


@contextlib.contextmanager
def exit_cleanly():
    """Turns an `LljaxError`, and a full disk, into one line on stderr and an exit code. For the
    `main` of scripts.

    What a terminal's encoding lacks is written as an escape from here on.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # something else stands in its place
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except LljaxError as error:
        _say(f"{type(error).__name__}: {printable(str(error))}")
        sys.exit(error.exit_code)
    except BaseException as error:
        text = next(iter(str(error).splitlines()), "")
        # of Rust, and no Exception: a tokenizer whose rules fail on a text
        if type(error).__name__ == "PanicException":
            _say(f"ModelError: the tokenizer fails on a text ({printable(text)[:200]})")
            sys.exit(ModelError.exit_code)
        if not isinstance(error, Exception) or not FULL.search(text):
            raise
        _say(f"DiskError: {printable(text)}: make room and give the same command again")
        sys.exit(LljaxError.exit_code)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr)
    except OSError:  # nobody reads it: Python must not try again at exit, with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)


def say(line: str) -> None:
    """A line on stderr from any thread, at once; nothing where nobody reads it any more."""
    with contextlib.suppress(OSError):
        os.write(
            STDERR,
            f"{SHOW_CURSOR if os.isatty(STDERR) else ''}{line}\n".encode(errors="backslashreplace"),
        )


def leave(code: int, line: str) -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    say(line)
    os._exit(code)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, printable; its class where
    there is none.
    """
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return printable(line.strip()) or type(error).__name__


def printable(text: str) -> str:
    """`text` with line breaks, terminal codes and what cannot be encoded shown as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
