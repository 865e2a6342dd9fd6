"""The charts of the report: data in, a matplotlib figure out (`lljax.report.drawing` writes it)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lljax.report.axes import length_axis, name_axis, new_axes, value_axis
from lljax.report.drawing import BOTTOM, COLORS, PLOT, describe, new_figure, printable_text
from lljax.report.numbers import MISSING, short_length
from lljax.report.step_chart import SERIES, Line, value_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE_ONLY = 26  # top margin of a chart without labels above the plot


def bar_chart(title: str, edges: Sequence[int], counts: Sequence[int], axis: str) -> "Figure":
    """A histogram with bars of equal width whatever their edges: powers of two stay readable."""
    figure = new_figure()
    axes = new_axes(figure, title, top=TITLE_ONLY)
    value_axis(axes, 0, 1.05 * max(*counts, 1), whole=True)
    axes.set_xlim(0, len(counts))
    for i, bar in enumerate(
        axes.bar(np.arange(len(counts)) + 0.5, counts, width=0.95, color=COLORS["curve"], alpha=0.8)
    ):
        describe(bar, "bar", f"{edges[i]:,} to {edges[i + 1]:,}: {counts[i]:,}")
    every = math.ceil(len(edges) / 7)
    axes.set_xticks(range(0, len(edges), every), [short_length(n) for n in edges[::every]])
    name_axis(axes, axis)
    return figure


def share_bar(title: str, parts: Mapping[str, float]) -> "Figure":
    """One bar divided into parts, each as long as its share of their sum."""
    from matplotlib.patches import Rectangle

    height, total, start = 34, sum(parts.values()), 0.0
    figure = new_figure(height=TITLE_ONLY + height + 6)
    axes = new_axes(figure, title, top=TITLE_ONLY, bottom=6)
    axes.set_axis_off()
    axes.set_xlim(0, total)
    axes.set_ylim(0, 1)
    for i, (name, value) in enumerate(parts.items()):
        box = axes.add_patch(Rectangle((start, 0), value, 1, color=part_color(i), linewidth=0))
        describe(box, f"part{i}", f"{name}: {value / total:.1%}")
        if value / total * PLOT > 44:
            axes.text(
                start + value / 2,
                0.5,
                f"{value / total:.0%}",
                ha="center",
                va="center",
                weight="bold",
                size=12,
                color=COLORS["text" if part_color(i) == COLORS["line"] else "card"],
            )
        start += value
    return figure


def part_color(number: int) -> str:
    return COLORS[("curve", "held", "alarm", "line")[number % 4]]


def length_chart(
    title: str,
    lengths: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    *,
    log: bool = False,
) -> "Figure | None":
    """Scores over equally spaced lengths, one line for each name; a score that is not finite is a
    gap. None if there is nothing to draw.

    Line i has the look SERIES[i]. log: a logarithmic y axis of scores above 0; otherwise the axis
    covers at least 0 to 100.
    """
    usable = {
        name: np.array([v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values])
        for name, values in lines.items()
    }
    scores = np.concatenate([values[np.isfinite(values)] for values in usable.values()] or [[]])
    if not len(scores):
        return None
    figure = new_figure()
    axes = new_axes(figure, title, top=TITLE_ONLY)
    if log:
        value_axis(axes, *value_range([Line(scores, scores, "smooth")], True, False), log=True)
    else:
        low, high = min(*scores, 0.0), max(*scores, 100.0)
        room = 0.05 * (high - low)  # for the rings
        value_axis(axes, low - room, high + room)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    for number, (name, values) in enumerate(usable.items()):
        color = COLORS[f"series{number % len(SERIES)}"]
        width, dashes, ring = SERIES[number % len(SERIES)]
        axes.plot(values, color=color, linewidth=width, linestyle=dashes, alpha=0.8)
        for i in np.flatnonzero(np.isfinite(values)).tolist():
            (point,) = axes.plot(
                [i], [values[i]], "o", markersize=ring, color=color, fillstyle="none", clip_on=False
            )
            text = f"{name} at {lengths[i]:,}: {values[i]:.4g}"
            describe(point, f"series{number % len(SERIES)}", text)
    length_axis(axes, lengths)
    return figure


def heatmap(
    title: str,
    lengths: Sequence[int],
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    samples: Sequence[int],
) -> "Figure":
    """A grid of scores from 0 to 100, rows by lengths, NaN if there is none.

    samples: examples behind each cell of a length, written into the cells; 0 if unknown. A cell is
    red below 50 and blue from there on, and more opaque the farther it is from 50.
    """
    from matplotlib.patches import Rectangle

    narrow = PLOT / len(lengths) < 84
    high = 40 if narrow else 30
    figure = new_figure(height=TITLE_ONLY + high * len(rows) + BOTTOM)
    axes = new_axes(figure, title, top=TITLE_ONLY)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row, scores in enumerate(values):
        for i, (score, n) in enumerate(zip(scores, samples, strict=False)):
            known = math.isfinite(score)
            distance = abs(min(max(score, 0), 100) - 50) / 50 if known else 1.0
            color = ("warm" if score < 50 else "cold") if known else "band"
            cell = Rectangle(
                (i - 0.49, row - 0.47),
                0.98,
                0.94,
                facecolor=COLORS[color],
                alpha=0.12 + 0.68 * distance,
                linewidth=0,
            )
            axes.add_patch(cell)
            shown = f"{score:.0f}" if known else MISSING
            counted = f"{chr(10) if narrow else ' '}n={n:,}" if known and n else ""
            describe(cell, "cell", f"{rows[row]} at {lengths[i]:,}: {shown}{counted}")
            axes.text(
                i,
                row,
                shown + counted,
                ha="center",
                va="center",
                size=12,
                weight="bold",
                color=COLORS["text"],
            )
    axes.set_yticks(range(len(rows)), [printable_text(row) for row in rows], parse_math=False)
    length_axis(axes, lengths)
    return figure


def spread(title: str, values: Mapping[str, Sequence[float]]) -> "Figure":
    """The values of each row as dots, with a bar of one standard deviation around their mean.

    Rows without values are left out.
    """
    rows = {name: some for name, some in values.items() if some}
    left = 30 + 6.5 * max(map(len, rows))
    figure = new_figure(left + 450, TITLE_ONLY + 20 * len(rows) + BOTTOM)
    axes = new_axes(figure, title, top=TITLE_ONLY, left=left, right=50)
    axes.grid(visible=False)
    axes.grid(axis="x", color=COLORS["line"], linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for number, some in enumerate(rows.values()):
        mean = statistics.fmean(some)
        axes.plot(some, [number] * len(some), "o", markersize=6, color=COLORS["curve"], alpha=0.4)
        error = statistics.stdev(some) if len(some) > 1 else 0.0
        axes.errorbar(mean, number, xerr=error, fmt="|", markersize=10, color=COLORS["curve"])
        axes.annotate(
            f"{mean:.4g}",
            (1, number),
            xytext=(4, -4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            size=11,
            color=COLORS["muted"],
            annotation_clip=False,
        )
    axes.set_yticks(range(len(rows)), list(rows), color=COLORS["text"], parse_math=False)
    return figure
