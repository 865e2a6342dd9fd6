"""Axes of the charts: margins, grid, and ticks for values, steps and lengths."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lljax.report.drawing import BOTTOM, COLORS, LEFT, RIGHT, TOP, printable_text
from lljax.report.numbers import compact, short_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_axes(
    figure: "Figure",
    title: str,
    *,
    top: float = TOP,
    left: float = LEFT,
    right: float = RIGHT,
    bottom: float = BOTTOM,
) -> "Axes":
    """Axes with the margins of every chart, horizontal grid lines and a title at the left."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
    )
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=COLORS["line"], linewidth=1)
    axes.tick_params(which="both", length=0, labelcolor=COLORS["muted"], labelsize=12)
    figure.text(
        left / width,
        1 - 13 / height,
        printable_text(title),
        size=14,
        weight="bold",
        color=COLORS["text"],
        parse_math=False,
    )
    return axes


def name_axis(axes: "Axes", name: str) -> None:
    """Writes `name` under the right end of the x axis."""
    axes.annotate(
        printable_text(name),
        (1, 0),
        xytext=(0, 6 - BOTTOM),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        size=12,
        color=COLORS["muted"],
        parse_math=False,
    )


def value_axis(
    axes: "Axes", low: float, high: float, *, log: bool = False, whole: bool = False
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    if log and high / low > 20:
        factors = (1, 2, 5) if high / low < 300 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=factors, numticks=8))
    else:  # within little more than a decade, 1, 2 and 5 would be too few ticks
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
    axes.set_ylim(low, high)


def tick_label(value: float) -> str:
    if 1e4 <= abs(value) < 1e15 or abs(value) >= 1e3 and value == int(value) and abs(value) < 1e4:
        return compact(value)
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}".replace("e+", "e")


def step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    name_axis(axes, "step")


def length_axis(axes: "Axes", lengths: Sequence[int]) -> None:
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    name_axis(axes, "length in tokens")
