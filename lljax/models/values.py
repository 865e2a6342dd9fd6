"""Checks of fields in JSON files from elsewhere (config.json, adapter_config.json), as tables."""

from collections.abc import Mapping

from lljax.config.checks import Condition, Value, one_of, whole
from lljax.errors import ModelError, short

__all__ = ["FLAG", "LARGEST", "NOT_NEGATIVE", "NUMBER", "OBJECT", "SHARE", "WORD", "Value", "check"]
__all__ += ["dict_of", "list_of", "one_of", "optional", "whole"]

LARGEST = 1e18  # the largest number: beyond any real one, and no float overflows


def optional(value: Condition) -> Value:
    return Value(lambda x: x is None or value.holds(x), f"{value.wanted} or null")


def list_of(value: Condition) -> Value:
    return Value(
        lambda x: type(x) is list and all(map(value.holds, x)),
        f"a list with {value.wanted} in every place",
    )


def dict_of(value: Condition) -> Value:
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


def check(given: dict, table: Mapping[str, Condition], where: str = "config.json") -> None:
    """Checks the fields of `table` that are given; where: their file, for the error.

    Raises:
      ModelError: a value is illegal; the first one.
    """
    for name, value in table.items():
        if name in given and not value.holds(given[name]):
            raise ModelError(
                f"{where}: {name} is {short(given[name])}; it has to be {value.wanted}"
            )
