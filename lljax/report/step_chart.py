"""The chart of values over training steps: lines, shaded stages and marked events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lljax.report.axes import new_axes, step_axis, value_axis
from lljax.report.drawing import COLORS, PLOT, describe, new_figure, printable_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 240  # columns of a thinned line: more than a screen resolves
READINGS = 60  # places along x that show their values under the pointer
SERIES = (  # (width, dashes, diameter of the rings) of line i: equal lines show through each other
    (5.0, "-", 13.0),
    (3.0, (0, (3, 2.3)), 10.8),
    (3.0, (0, (1, 1.7)), 8.6),
    (2.0, "-", 6.4),
    (2.0, (0, (4.5, 3.5)), 4.2),
    (2.0, (0, (1.5, 2.5)), 2.0),
)
LINES: dict[str, dict[str, Any]] = {
    "raw": {"color": COLORS["curve"], "linewidth": 1.0, "alpha": 0.38},
    "smooth": {"color": COLORS["curve"], "linewidth": 2.0},
    "held": {
        "color": COLORS["held"],
        "linestyle": "none",
        "marker": "o",
        "markersize": 8.0,
        "markerfacecolor": COLORS["card"],
        "markeredgewidth": 2.0,
    },
    **{
        f"series{i}": {
            "color": COLORS[f"series{i}"],
            "linewidth": 2.0,
            "linestyle": dashes,
            "marker": "o",
            "markersize": 5.0,
        }
        for i, (_, dashes, _) in enumerate(SERIES)
    },
}
MARKS = {"skipped": "alarm", "warned": "card", "back": "held"}  # color of their face


@dataclass(frozen=True)
class Line:
    """Points in the order of x; a y that is not finite is a gap. kind: a key of LINES."""

    x: np.ndarray
    y: np.ndarray
    kind: str


@dataclass(frozen=True)
class Mark:
    """An event at x, at the upper edge if y is not finite. kind: a key of MARKS."""

    x: float
    y: float
    kind: str
    text: str


@dataclass(frozen=True)
class Band:
    """A shaded interval of x with two lines of text above it, or `short` if there is less room."""

    start: float
    stop: float
    first: str
    second: str
    short: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    log: bool = False,
    from_zero: bool = False,
    readings: Mapping[str, Line] | None = None,
) -> "Figure | None":
    """`lines` over training steps; None if no line has a finite point.

    log: a logarithmic y axis, on which values of 0 and below are gaps. from_zero: the y axis starts
      at 0.
    readings: the values to show under the pointer, by name.
    """
    if log:
        lines = [replace(line, y=np.where(line.y > 0, line.y, np.nan)) for line in lines]
    if not any(np.isfinite(line.y).any() for line in lines):
        return None
    figure = new_figure()
    axes = new_axes(figure, title)
    value_axis(axes, *value_range(lines, log, from_zero), log=log)
    first, last = (f(f(line.x) for line in lines if len(line.x)) for f in (min, max))
    axes.set_xlim(*((first, last) if first < last else (first - 1, last + 1)))
    step_axis(axes)
    _shade(axes, bands)
    _add_readings(axes, readings or {}, bands)
    for line in lines:
        _draw_line(axes, line)
    for mark in marks:
        _draw_mark(axes, mark)
    return figure


def value_range(lines: Sequence[Line], log: bool, from_zero: bool) -> tuple[float, float]:
    """The limits of a y axis: all points, but of many raw ones on a linear axis the inner 99%."""
    ends: list[float] = []
    for line in lines:
        y = line.y[np.isfinite(line.y)]
        if len(y):
            share = 0.005 if line.kind == "raw" and len(y) > 100 and not log else 0.0
            ends += np.quantile(y, [share, 1 - share]).tolist()
    low, high = min(ends), max(ends)
    if log:
        low, high = low / 1.1, high * 1.1
        return (low, high) if high / low >= 2 else (low / 1.5, high * 1.5)
    # Never finer than 1% of the value: the labels would be long, and the differences are noise.
    room = max(0.05 * (high - low), 0.01 * max(abs(high), abs(low))) or 1.0
    return (0.0 if from_zero else low - room), high + room


def smoothed(y: np.ndarray, window: int, groups: np.ndarray) -> np.ndarray:
    """Running median over `window` (odd) values, never across `groups`; NaN where the window has no
    finite value. float64 [n].

    A median, so that neither a spike nor a step that compiled shows in its neighbors. Of a long
    series only every n-th value is computed, and the values between are interpolated.
    """
    result = np.full(len(y), np.nan)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        stride = max(1, len(members) // (4 * POINTS))
        inside = np.where(np.isfinite(y[members]), y[members], np.nan)
        padded = np.pad(inside, window // 2, constant_values=np.nan)
        around = np.lib.stride_tricks.sliding_window_view(padded, window)
        some = np.isfinite(around).any(axis=1)
        centers = np.flatnonzero(some)[::stride]
        if len(centers):
            medians = np.nanmedian(around[centers], axis=1)
            result[members[some]] = np.interp(np.flatnonzero(some), centers, medians)
    return result


def _shade(axes: "Axes", bands: Sequence[Band]) -> None:
    low, high = axes.get_xlim()
    for i, band in enumerate(bands):
        start, stop = max(band.start, low), min(band.stop, high)
        axes.axvspan(
            start, stop, facecolor=COLORS["band"], alpha=0.4 if i % 2 else 1, linewidth=0, zorder=0
        )
        if i:
            axes.axvline(
                start, color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)), alpha=0.6
            )
        width = (stop - start) / (high - low) * PLOT
        label = f"{band.first}\n{band.second}" if width >= 62 else band.short
        if width >= 36:
            axes.text(
                (start + stop) / 2,
                1.02,
                printable_text(label),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                size=11,
                color=COLORS["muted"],
                parse_math=False,
            )


def _add_readings(axes: "Axes", readings: Mapping[str, Line], bands: Sequence[Band]) -> None:
    """Invisible strips over the plot whose titles give the values at their middle."""
    if not readings:
        return
    from matplotlib.patches import Rectangle

    steps = next(iter(readings.values())).x
    chosen = np.unique(
        np.linspace(0, len(steps) - 1, min(READINGS, len(steps))).round().astype(int)
    )
    middles = steps[chosen]
    low, high = axes.get_xlim()
    look: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "facecolor": "none",
        "linewidth": 0,
        "zorder": 10,
        "clip_on": False,
    }
    edges = [low, *((middles[1:] + middles[:-1]) / 2), high]
    for i, left, right in zip(chosen, edges[:-1], edges[1:], strict=True):
        stage = [f"{b.first} {b.second}" for b in bands if b.start <= steps[i] <= b.stop][-1:]
        values = (f"{name} {line.y[i]:.4g}" for name, line in readings.items())
        strip = axes.add_artist(Rectangle((left, 0), right - left, 1, **look))
        describe(strip, "strip", ", ".join([f"step {steps[i]:,.0f}", *stage, *values]))


def _draw_line(axes: "Axes", line: Line) -> None:
    keep = _thinned(line)
    x, y = line.x[keep], line.y[keep]
    low, high = axes.get_ylim()
    look = LINES[line.kind]
    if "marker" in look:
        axes.plot(x, np.clip(y, low, high), clip_on=False, **look)
        return
    axes.plot(x, y, solid_joinstyle="round", **look)
    finite = np.isfinite(np.concatenate([[np.nan], y, [np.nan]]))
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], "o", markersize=5, color=look["color"])


def _thinned(line: Line) -> np.ndarray:
    """The indices to draw: the lowest and highest point and the first gap of each column."""
    n = len(line.x)
    if n <= 2 * POINTS:
        return np.arange(n)
    keep = {0, n - 1}
    for indices in np.array_split(np.arange(n), POINTS):
        y = line.y[indices]
        finite = np.isfinite(y)
        if finite.any():
            keep |= {
                int(indices[np.argmin(np.where(finite, y, np.inf))]),
                int(indices[np.argmax(np.where(finite, y, -np.inf))]),
            }
        if not finite.all():
            keep.add(int(indices[np.argmin(finite)]))
    return np.array(sorted(keep))


def _draw_mark(axes: "Axes", mark: Mark) -> None:
    edge = not math.isfinite(mark.y) or (axes.get_yscale() == "log" and mark.y <= 0)
    low, high = axes.get_ylim()
    (point,) = axes.plot(
        [mark.x],
        [high if edge else min(max(mark.y, low), high)],
        "v" if edge else "o",
        markersize=8,
        markerfacecolor=COLORS[MARKS[mark.kind]],
        markeredgecolor=COLORS["alarm"],
        markeredgewidth=1.5,
        clip_on=False,
        zorder=11,
    )
    describe(point, mark.kind, mark.text)
