"""Whole numbers rounded up: lengths, rows and blocks that are cut into equal parts."""

from typing import Any, TypeVar

Whole = TypeVar("Whole", bound=Any)  # an int, or an array of integers


def cdiv(a: Whole, b: int) -> Whole:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(length: int, size: int) -> int:
    """The smallest multiple of `size` that is at least `length`."""
    return cdiv(length, size) * size
