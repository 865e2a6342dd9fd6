"""Line charts as inline SVG: what a report needs and no more."""

import html
import math
from typing import NamedTuple

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 26, 30    # margins, which hold the labels


class Band(NamedTuple):
    """A stage of the curriculum, shaded and labelled over steps [start, stop]."""

    start: float
    stop: float
    label: str


class Line(NamedTuple):
    points: list[tuple[float, float]]
    kind: str                                # a CSS class: "raw" | "smooth" | "eval"


def line_chart(lines: list[Line], *, bands=(), marks=(), log: bool = False) -> str:
    """An SVG of lines over steps. `marks`: points to be told apart, such as alarms. Points that cannot be drawn (not
    finite, or not positive on a log axis) are left out."""
    def drawable(points):
        return [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y) and (y > 0 or not log)]

    lines = [Line(drawable(line.points), line.kind) for line in lines]
    marks = drawable(marks)
    points = [point for line in lines for point in line.points]
    if not points:
        return '<p class="none">Nothing to draw yet.</p>'
    xs, ys = zip(*points, strict=True)
    left, right = min((*xs, *(b.start for b in bands))), max((*xs, *(b.stop for b in bands)))
    ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(ys), max(ys))
    scale = math.log10 if log else float
    low, high = scale(min(ticks[0], *ys)), scale(max(ticks[-1], *ys))

    def x_at(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def y_at(y):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - ((scale(y) - low) / (high - low) if high > low else 0.5))

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for i, band in enumerate(bands):
        x, width = x_at(band.start), x_at(band.stop) - x_at(band.start)
        out.append(f'<rect class="band{i % 2}" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>')
        if width > 6.2 * len(band.label):    # a label that does not fit its stage is in the table of stages
            out.append(f'<text class="band" x="{x + width / 2:.1f}" y="{TOP - 8}">{html.escape(band.label)}</text>')
    for tick in ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>'
                   f'<text class="y" x="{LEFT - 8}" y="{y_at(tick) + 4:.1f}">{number(tick)}</text>')
    for tick in linear_ticks(left, right):
        if left <= tick <= right and tick == int(tick):
            out.append(f'<text class="x" x="{x_at(tick):.1f}" y="{HEIGHT - 10}">{number(tick)}</text>')
    for line in lines:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        out.append(f'<polyline class="{line.kind}" points="{path}"/>')
        if line.kind == "eval" or len(line.points) == 1:
            out += [f'<circle class="{line.kind}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>' for x, y in line.points]
    out += [f'<circle class="mark" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4"/>' for x, y in marks]
    return "".join(out) + "</svg>"


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high]; between two powers also 2 and 5 times them, where few would be left."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        return [10.0 ** e for e in range(first, last + 1)]
    every = [m * 10.0 ** e for e in range(first, last + 1) for m in (1, 2, 5)]
    below, above = [t for t in every if t <= low * 1.0001], [t for t in every if t >= high * 0.9999]
    return [t for t in every if below[-1:] <= [t] and [t] <= above[:1]] if below and above else every


def number(value: float) -> str:
    """Short: 12,000 as 12k, 0.00012 as 1.2e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:g}k"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def smooth(points: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """An exponential moving average over the finite points, without the pull of its start towards zero."""
    total, norm, out = 0.0, 0.0, []
    for x, y in points:
        if isinstance(y, (int, float)) and math.isfinite(y):
            total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
            out.append((x, total / norm))
    return out
