"""Whole numbers rounded up: lengths, rows and blocks that are cut into equal parts."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(length: int, size: int) -> int:
    """The smallest multiple of `size` that is at least `length`."""
    return cdiv(length, size) * size
