"""Numbers for readers: counts, lengths, durations, and values to four significant figures."""

import math
from typing import Any

import numpy as np

MISSING = "\u2013"
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def compact(value: float) -> str:
    """A count or a measurement in few characters: 950, 9,500, 16.4k, 1.23M, 3.142."""
    for size, unit in UNITS:
        if abs(value) >= max(size, 1e4):
            digits = ".3g" if abs(value) < 999.5 * size else ",.0f"
            return f"{value / size:{digits}}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def short_length(tokens: int) -> str:
    """A length in units of 1,024 tokens: 512, 16k, 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return compact(tokens)


def duration(seconds: float) -> str:
    """A duration: 3.5 s, 42 s, 3 min 20 s, 5 h 03 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(float(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02} min"


def four_figures(value: float) -> str:
    """A number to four significant figures; integers in full, with separators."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"


def to_float(value: Any) -> float:
    """A value of metrics.jsonl, in which "nan" and "inf" are strings; NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def column(records: list[dict], name: str) -> np.ndarray:
    """The values of a field, float64 [n]; NaN where a record has no finite value."""
    values = np.array([to_float(record.get(name)) for record in records])
    return np.where(np.isfinite(values), values, np.nan)


def finite_column(records: list[dict], name: str) -> np.ndarray:
    """The finite values of a field, float64 [m]."""
    values = column(records, name)
    return values[np.isfinite(values)]
