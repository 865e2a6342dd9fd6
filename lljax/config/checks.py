"""Checks of single configuration fields; `lljax.config.CHECKS` is a table of them.

A check is called with the name of a field and its value. It raises ConfigError if the value is
illegal, in one line of bounded length.
"""

import math
import os
from collections.abc import Callable

from lljax.errors import ConfigError, short

Check = Callable[[str, object], None]

INT32 = 2**31 - 1
TOKENS = 2**24  # a float32 angle tells positions apart up to here
TINY = 2.0**-126  # float32 holds nothing smaller at full precision
HUGE = 1e30  # float32 ends at 3e38, and products need room
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def whole(least: int, most: int = INT32, why: str = "") -> Check:
    """An integer from `least` to `most`; why: what an illegal one would do."""
    says = f"is not a whole number from {least} to {most:,}{why and ': ' + why}"
    return _check(lambda x: type(x) is int and least <= x <= most, says)


def number(least: float, most: float = HUGE, why: str = "") -> Check:
    """A finite number from `least` to `most`."""
    says = f"is not a number from {least:g} to {most:.9g}{why and ': ' + why}"
    return _check(lambda x: _is_number(x) and least <= x <= most, says)


def above_zero(most: float = HUGE, why: str = "") -> Check:
    """A finite number that is above 0 in float32 too."""
    says = f"is not a number above 0, at most {most:.9g}{why and ': ' + why}"
    return _check(lambda x: _is_number(x) and TINY <= x <= most, says)


def share() -> Check:
    return _check(lambda x: _is_number(x) and 0 <= x < 1, "is not a share, from 0 to below 1")


def flag() -> Check:
    return _check(lambda x: isinstance(x, bool), "is neither True nor False")


def one_of(*choices: str) -> Check:
    return _check(lambda x: isinstance(x, str) and x in choices, f"is none of {', '.join(choices)}")


def text() -> Check:
    """A text that is not empty."""
    return _check(
        lambda x: isinstance(x, str) and 0 < len(x) <= 4096,
        "is not a text of 1 to 4,096 characters",
    )


def path() -> Check:
    """A text that can be a path; empty for none."""
    return _check(_is_path, "is not a path: at most 4,096 characters, each name at most 255 bytes")


def required(check: Check, how: str) -> Check:
    """`check`, and not empty; how: what to set the field to."""

    def run(field, value):
        if value in ("", (), []):
            raise ConfigError(f"{field} is empty: {how}")
        check(field, value)

    return run


def several(check: Check) -> Check:
    """A tuple (or list) of values that each pass `check`."""

    def run(field, value):
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{field}={short(value)} is not a tuple, such as ('a', 'b')")
        for number, item in enumerate(value):
            check(f"{field}[{number}]", item)

    return run


def pair(first: Check, second: Check, example: tuple) -> Check:
    """A pair whose values pass `first` and `second`."""

    def run(field, value):
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ConfigError(f"{field}={short(value)} is not a pair such as {example}")
        first(f"{field}[0]", value[0])
        second(f"{field}[1]", value[1])

    return run


def any_of(*checks: Check) -> Check:
    """Passes if one of `checks` passes; otherwise the last of them raises."""

    def run(field, value):
        for check in checks[:-1]:
            try:
                return check(field, value)
            except ConfigError:
                continue
        checks[-1](field, value)

    return run


def _check(holds: Callable[[object], bool], says: str) -> Check:
    def run(field, value):
        if not holds(value):
            raise ConfigError(f"{field}={short(value)} {says}")

    return run


def _is_number(x) -> bool:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    return isinstance(x, int) or math.isfinite(x)


def _is_path(x) -> bool:
    if not isinstance(x, str) or len(x) > 4096 or "\0" in x:
        return False
    try:
        return all(len(os.fsencode(part)) <= 255 for part in x.split("/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
