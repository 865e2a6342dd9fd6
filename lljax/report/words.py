"""Numbers as people read them."""

UNKNOWN = "\u2013"


UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def compact(value: float) -> str:
    """A count or a measure in few characters: 950, 9,500, 16.4k, 1.23M, 3.142."""
    for size, unit in UNITS:
        if abs(value) >= max(size, 1e4):
            return (
                f"{value / size:.3g}{unit}"
                if abs(value) < 999.5 * size
                else f"{value / size:,.0f}{unit}"
            )
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def short_length(tokens: int) -> str:
    """A length as people say it, in units of 1,024: 512, 16k, 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return compact(tokens)
