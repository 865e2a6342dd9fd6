"""Checks of single values.

A check is called with the name of a field, as the user wrote it, and a value. It raises ConfigError
if the value is illegal, in one line of bounded length. `Value` and `Choices` are conditions too,
which the tables of config.json (lljax/models/values.py) share.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable
from typing import Any, Protocol

from lljax.errors import ConfigError, short

Check = Callable[[str, Any], None]

INT32 = 2**31 - 1
TOKENS = 2**24  # a float32 angle tells positions apart up to here
TINY = 2.0**-126  # float32 holds nothing smaller at full precision
HUGE = 1e30  # float32 ends at 3e38, and products need room
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


class Condition(Protocol):
    """A condition on a value. wanted: the legal values, in words that follow "is not"."""

    @property
    def wanted(self) -> str: ...

    def holds(self, value: Any, /) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Value:
    """A check of one condition."""

    holds: Callable[[Any], bool]
    wanted: str

    def __call__(self, field: str, value: Any) -> None:
        if not self.holds(value):
            raise ConfigError(f"{field}={short(value)} is not {self.wanted}")


@dataclasses.dataclass(frozen=True)
class Choices:
    """A check: one of `words`, or a key of the table `owner`, named "package.module:TABLE".

    The room of the table may be above this one: it is imported when its keys are needed.
    """

    words: tuple[str, ...]
    owner: str = ""

    def table(self) -> Any:
        """The owner's table."""
        module, _, name = self.owner.partition(":")
        return getattr(importlib.import_module(module), name)

    def all(self) -> tuple[str, ...]:
        return (*self.words, *self.table()) if self.owner else self.words

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and (value in self.words or value in self.all())

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.all())}"

    def __call__(self, field: str, value: Any) -> None:
        if not self.holds(value):
            raise ConfigError(f"{field}={short(value)} is none of {', '.join(self.all())}")


def one_of(*words: str, owner: str = "") -> Choices:
    return Choices(words, owner)


@dataclasses.dataclass(frozen=True)
class Several:
    """A check: a tuple (or list) of values that each pass `item`."""

    item: Check

    def __call__(self, field: str, value: Any) -> None:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{field}={short(value)} is not a tuple, such as ('a', 'b')")
        for number, item in enumerate(value):
            self.item(f"{field}[{number}]", item)


def whole(least: int, most: int = INT32, why: str = "") -> Value:
    """An integer from `least` to `most`; why: the reason for the bounds."""
    return Value(
        lambda x: type(x) is int and least <= x <= most,
        f"a whole number from {least:,} to {most:,}{why and ': ' + why}",
    )


def number(least: float, most: float = HUGE, why: str = "") -> Value:
    """A finite number from `least` to `most`."""
    return Value(
        lambda x: is_number(x) and least <= x <= most,
        f"a number from {least:g} to {most:.9g}{why and ': ' + why}",
    )


def above_zero(most: float = HUGE, why: str = "") -> Value:
    """A finite number that is above 0 in float32 too."""
    return Value(
        lambda x: is_number(x) and TINY <= x <= most,
        f"a number above 0, at most {most:.9g}{why and ': ' + why}",
    )


def share() -> Value:
    return Value(lambda x: is_number(x) and 0 <= x < 1, "a share, from 0 to below 1")


def flag() -> Value:
    return Value(lambda x: isinstance(x, bool), "True or False")


def text() -> Value:
    """A text that is not empty."""
    return Value(
        lambda x: isinstance(x, str) and 0 < len(x) <= 4096, "a text of 1 to 4,096 characters"
    )


def path() -> Value:
    """A text that can be a path; empty for none."""
    return Value(_is_path, "a path: at most 4,096 characters, each name at most 255 bytes")


def required(check: Check, hint: str) -> Check:
    """`check`, and not empty; hint: a legal value, in words."""

    def run(field: str, value: Any) -> None:
        if value in ("", (), []):
            raise ConfigError(f"{field} is empty: {hint}")
        check(field, value)

    return run


def pair(first: Check, second: Check, example: tuple) -> Check:
    """A pair whose values pass `first` and `second`."""

    def run(field: str, value: Any) -> None:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ConfigError(f"{field}={short(value)} is not a pair such as {example}")
        first(f"{field}[0]", value[0])
        second(f"{field}[1]", value[1])

    return run


def any_of(*checks: Check) -> Check:
    """Passes if one of `checks` passes; otherwise the last of them raises."""

    def run(field: str, value: Any) -> None:
        for check in checks[:-1]:
            try:
                return check(field, value)
            except ConfigError:
                continue
        checks[-1](field, value)

    return run


def is_number(x: Any) -> bool:
    """Whether x is an integer or a finite float, and no bool."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    return isinstance(x, int) or math.isfinite(x)


def _is_path(x: Any) -> bool:
    if not isinstance(x, str) or len(x) > 4096 or "\0" in x:
        return False
    try:
        return all(len(os.fsencode(part)) <= 255 for part in x.split("/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
