"""What a field of somebody else's JSON may hold, said in tables; a wrong value is one line."""

from collections.abc import Callable
from typing import NamedTuple

from lljax.errors import ModelError, short

LARGEST = 1e18  # of a number: beyond any real one, and no float overflows
MOST = 2**31 - 1  # of a count


class Value(NamedTuple):
    holds: Callable[[object], bool]
    wanted: str


def whole(least: int, most: int = MOST) -> Value:
    return Value(
        lambda x: type(x) is int and least <= x <= most,
        f"a whole number from {least:,} to {most:,}",
    )


def one_of(*words: str) -> Value:
    return Value(lambda x: type(x) is str and x in words, f"one of {', '.join(words)}")


def optional(value: Value) -> Value:
    return Value(lambda x: x is None or value.holds(x), f"{value.wanted} or null")


def list_of(value: Value) -> Value:
    return Value(
        lambda x: type(x) is list and all(map(value.holds, x)),
        f"a list with {value.wanted} in every place",
    )


def dict_of(value: Value) -> Value:
    return Value(
        lambda x: type(x) is dict and all(map(value.holds, x.values())),
        f"an object with {value.wanted} in every place",
    )


# A comparison with NaN is false, and True is no number.
NUMBER = Value(lambda x: type(x) in (int, float) and 0 < x <= LARGEST, "a number above 0")
NOT_NEGATIVE = Value(lambda x: type(x) in (int, float) and 0 <= x <= LARGEST, "a number from 0 on")
SHARE = Value(lambda x: type(x) in (int, float) and 0 < x <= 1, "a share above 0 and at most 1")
FLAG = Value(lambda x: x is None or type(x) is bool, "true or false")
WORD = Value(lambda x: type(x) is str, "a word")
OBJECT = Value(lambda x: type(x) is dict, "an object")


def check(given: dict, table: dict[str, Value], where: str = "config.json") -> None:
    """Compares the fields of `table` that are given with what they may hold.

    Raises:
      ModelError: the first that does not hold what is wanted.
    """
    for name, value in table.items():
        if name in given and not value.holds(given[name]):
            raise ModelError(
                f"{where}: {name} is {short(given[name])}; it has to be {value.wanted}"
            )
