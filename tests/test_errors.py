"""Errors end a command in one line and with their exit code."""

import errno
import os

import pytest

from lljax.errors import (
    ConfigError,
    DataError,
    LljaxError,
    counted,
    exit_cleanly,
    first_line,
    printable,
    short,
)


@pytest.mark.parametrize(
    "error,code,line",
    [
        (ConfigError("lora.rank=0\nis wrong"), 2, "ConfigError: lora.rank=0\\nis wrong"),
        (DataError("no rows"), 3, "DataError: no rows"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            1,
            "DiskError: [Errno 28] No space left",
        ),
        (type("PanicException", (BaseException,), {})("rules"), 2, "ModelError: the tokenizer"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as exit, exit_cleanly():
        raise error
    (printed,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == code and printed.startswith(line)


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_cleanly():
        raise ZeroDivisionError


def test_exit_codes_are_unique_except_for_models_which_count_as_configuration():
    codes = [error.exit_code for error in LljaxError.__subclasses__()]
    assert len({*codes, LljaxError.exit_code}) == len(codes) + 1


def test_terminal_codes_and_line_breaks_are_shown_escaped():
    assert printable("a\x1b[31m\nb\ud800é") == "a\\x1b[31m\\nb\\ud800é"
    assert first_line(ValueError("\n  two\x07 words\nmore")) == "two\\x07 words"
    assert first_line(ValueError()) == "ValueError"


def test_short_bounds_the_text_of_any_value():
    for value in (10**10_000, "x" * 10_000, [[["a"] * 99] * 99] * 99, "\ud800", object()):
        assert len(short(value)) <= 120 and short(value).isprintable()


def test_a_count_has_the_singular_for_one_alone():
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
