"""Small SVG charts for the report: numbers in, text out. Colours and fonts are the page's (classes,
no styles).
"""

import dataclasses
import math
from html import escape

import numpy as np

from lljax.report.words import UNITS, UNKNOWN, short_length

WIDTH, HEIGHT = 560, 276  # units of the viewBox; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 54, 40  # margins: y labels, -, labels of the bands, x labels
COLUMNS = 240  # points of a line, and more than a screen resolves
SERIES = 6  # looks of a line for a model; with more of them they come again
READINGS = 80  # places along x that answer the pointer


@dataclasses.dataclass(frozen=True)
class Line:
    """Points in the order of x; a y that is not finite is a gap. kind is a class of the page: raw |
    smooth | held.
    """

    x: np.ndarray
    y: np.ndarray
    kind: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event at x; a y that is not finite is marked at the upper edge. kind: skipped | warned."""

    x: float
    y: float
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Band:
    """A stretch of x, shaded, with two short lines of text above it, or `short` where there is room
    for less.
    """

    start: float
    stop: float
    first: str
    second: str
    short: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to places in [start, stop], linearly or in the logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def clamped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))


def line_chart(
    title: str,
    lines: list[Line],
    *,
    bands: list[Band] = (),
    marks: list[Mark] = (),
    log: bool = False,
    from_zero: bool = False,
    readings: dict[str, Line] | None = None,
) -> str:
    """An SVG of `lines` over steps, or an empty text where no line has a finite point.

    log: a logarithmic y axis, on which values of 0 and below are gaps. from_zero: the y axis starts
      at 0.
    readings: what the pointer is told at a step, by name.
    """
    lines = [
        dataclasses.replace(line, y=np.where(line.y > 0, line.y, np.nan) if log else line.y)
        for line in lines
    ]
    if not any(np.isfinite(line.y).any() for line in lines):
        return ""
    x = _steps_scale(lines, marks)
    y = _value_scale(lines, log, from_zero)
    y_ticks, labels, power = _value_ticks(y)
    body = [
        f'<text class="name" x="{LEFT}" y="13">{escape(title)}{power}</text>',
        *_bands(bands, x),
        *(f'<path class="grid" d="M{LEFT} {_n(y(t))}H{WIDTH - RIGHT}"/>' for t in y_ticks),
        *(
            f'<text class="tick" x="{LEFT - 7}" y="{_n(y(t) + 4)}" text-anchor="end">{label}</text>'
            for t, label in zip(y_ticks, labels)
        ),
    ]
    for tick in _nice(x.low, x.high, 6, whole=True):
        body.append(
            f'<text class="tick" x="{_n(x(tick))}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{tick:,.0f}</text>"
        )
    body.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step</text>'
    )
    body += _readings(readings or {}, bands, x)
    body += [_draw(line, x, y) for line in lines]
    body += [_mark(mark, x, y) for mark in marks]
    return _svg(title, body)


def bar_chart(title: str, edges: list[float], counts: list[int], axis: str) -> str:
    """An SVG histogram with bars of one width whatever the distance of their edges, so that powers
    of two read well.
    """
    y = Scale(0, 1.05 * max(*counts, 1), HEIGHT - BOTTOM, TOP - 28)
    each = (WIDTH - LEFT - RIGHT) / len(counts)
    y_ticks, labels, _ = _value_ticks(y, whole=True)
    body = [f'<text class="name" x="{LEFT}" y="13">{escape(title)}</text>']
    for tick, label in zip(y_ticks, labels):
        body.append(
            f'<path class="grid" d="M{LEFT} {_n(y(tick))}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{_n(y(tick) + 4)}" text-anchor="end">{label}</text>'
        )
    for i, count in enumerate(counts):
        about = f"{edges[i]:,} to {edges[i + 1]:,}: {count:,}"
        box = f'x="{_n(LEFT + i * each + 1)}" width="{_n(max(each - 2, 1))}"'
        body.append(
            f'<rect class="bar" {box} y="{_n(y(count))}" height="{_n(y(0) - y(count))}">'
            f"<title>{about}</title></rect>"
        )
    every = math.ceil(len(edges) / 7)
    for i in range(0, len(edges), every):
        body.append(
            f'<text class="tick" x="{_n(LEFT + i * each)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{short_length(edges[i])}</text>"
        )
    body.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(axis)}</text>'
    )
    return _svg(title, body)


def share_bar(title: str, parts: dict[str, float]) -> str:
    """An SVG of one bar cut into parts, each as long as its share of their sum."""
    total, height = sum(parts.values()), 34
    body, at = [f'<text class="name" x="{LEFT}" y="13">{escape(title)}</text>'], float(LEFT)
    for i, (name, value) in enumerate(parts.items()):
        width = value / total * (WIDTH - LEFT - RIGHT)
        body.append(
            f'<rect class="part{i}" x="{_n(at)}" y="26" width="{_n(width)}" height="{height}">'
            f"<title>{escape(name)}: {value / total:.1%}</title></rect>"
        )
        if width > 44:
            body.append(
                f'<text class="share" x="{_n(at + width / 2)}" y="{26 + height / 2 + 4:.0f}" text-anchor="middle">'
                f"{value / total:.0%}</text>"
            )
        at += width
    return _svg(title, body, 26 + height + 6)


def length_chart(
    title: str, lengths: list[int], lines: dict[str, list[float]], *, log: bool = False
) -> str:
    """An SVG of scores over lengths that are equally far apart, a line for each name; a score that
    is not finite is a gap.

    Line i has the class `series{i}`, whose colour, width and dashes differ, and rings of a size of
    its own, so that equal ones show through each other. log: a logarithmic y axis for scores above
    0; otherwise it reaches from 0 to 100 at least. An empty text where there is nothing to draw.
    """
    usable = lambda value: math.isfinite(value) and (value > 0 or not log)
    told = [value for values in lines.values() for value in values if usable(value)]
    if not told:
        return ""
    if log:
        y = _value_scale(
            [Line(np.arange(len(told)), np.array(told), "series")], log=True, from_zero=False
        )
    else:
        low, high = min(*told, 0.0), max(*told, 100.0)
        # room for rings
        y = Scale(low - 0.05 * (high - low), high + 0.05 * (high - low), HEIGHT - BOTTOM, TOP - 28)
    x = lambda i: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(lengths)
    y_ticks, labels, _ = _value_ticks(y)
    body = [
        f'<text class="name" x="{LEFT}" y="13">{escape(title)}</text>',
        *(
            f'<path class="grid" d="M{LEFT} {_n(y(t))}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{_n(y(t) + 4)}" text-anchor="end">{label}</text>'
            for t, label in zip(y_ticks, labels)
        ),
        *_lengths_below(lengths, x, HEIGHT - BOTTOM),
    ]
    for number, (name, values) in enumerate(lines.items()):
        looks = number % SERIES
        runs, points = (
            [[]],
            [(x(i), y(value)) if usable(value) else None for i, value in enumerate(values)],
        )
        for point in points:
            runs[-1].append(point) if point else runs.append([])
        path = "".join(
            "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in run) for run in runs if len(run) > 1
        )
        body.append(f'<path class="series{looks}" d="{path}"/>' if path else "")
        body += [
            f'<circle class="series{looks} ring" cx="{_n(point[0])}" cy="{_n(point[1])}" r="{6.5 - 1.1 * looks:.1f}">'
            f"<title>{escape(name)} at {length:,}: {value:.4g}</title></circle>"
            for point, length, value in zip(points, lengths, values)
            if point
        ]
    return _svg(title, body)


def heatmap(
    title: str, lengths: list[int], rows: list[str], values: list[list[float]], samples: list[int]
) -> str:
    """An SVG grid of scores from 0 to 100, rows by lengths, NaN where there is none. samples: of
    each cell of a length, told in the cells; 0 where it is not known.

    A cell has the class `cold` or `warm` of its half of the scale, as opaque as it is far from the
    middle.
    """
    wide, top = (WIDTH - LEFT - RIGHT) / len(lengths), 26
    narrow = wide < 84  # too narrow for both on a line, in the larger letters of a phone
    high = 40 if narrow else 30
    x, height = (lambda i: LEFT + wide * (i + 0.5)), top + high * len(rows) + BOTTOM
    body = [
        f'<text class="name" x="{LEFT}" y="13">{escape(title)}</text>',
        *_lengths_below(lengths, x, height - BOTTOM),
    ]
    for at, (row, scores) in enumerate(zip(rows, values)):
        y = top + high * at
        body.append(
            f'<text class="tick" x="{LEFT - 7}" y="{_n(y + high / 2 + 4)}" text-anchor="end">{escape(row)}</text>'
        )
        for i, (score, n) in enumerate(zip(scores, samples)):
            known = math.isfinite(score)
            far = abs(min(max(score, 0), 100) - 50) / 50 if known else 0
            half = ("warm" if score < 50 else "cold") if known else "none"
            told = f"{score:.0f}" if known else UNKNOWN
            start = f' x="{_n(x(i))}" dy="1.1em">' if narrow else "> "
            counted = f'<tspan class="count"{start}n={n:,}</tspan>' if known and n else ""
            body.append(
                f'<rect class="cell {half}" x="{_n(x(i) - wide / 2 + 1)}" y="{y + 1}" width="{_n(wide - 2)}" '
                f'height="{high - 2}" fill-opacity="{0.12 + 0.68 * far:.2f}"/><text class="score" x="{_n(x(i))}" '
                f'y="{_n(y + high / 2 + (-2 if narrow and counted else 5))}" text-anchor="middle">'
                f"{told}{counted}</text>"
            )
    return _svg(title, body, height)


def smoothed(y: np.ndarray, window: int, groups: np.ndarray) -> np.ndarray:
    """The median of the finite values among the `window` (odd) around each, never across `groups`.
    float64 [n].

    A median, so that a spike or a step that compiled does not show in its neighbours.
    """
    out = np.full(len(y), np.nan)
    for group in np.unique(groups):
        at = np.flatnonzero(groups == group)
        padded = np.pad(
            np.where(np.isfinite(y[at]), y[at], np.nan), window // 2, constant_values=np.nan
        )
        around = np.lib.stride_tricks.sliding_window_view(padded, window)
        some = np.isfinite(around).any(axis=1)
        out[at[some]] = np.nanmedian(around[some], axis=1)
    return out


def _lengths_below(lengths: list[int], x, y: float) -> list[str]:
    """The labels of an axis of lengths, `x` of whose numbers are the places; `y` is its height."""
    return [
        *(
            f'<text class="tick" x="{_n(x(i))}" y="{_n(y + 17)}" text-anchor="middle">{short_length(length)}</text>'
            for i, length in enumerate(lengths)
        ),
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{_n(y + BOTTOM - 5)}" text-anchor="end">length in tokens</text>',
    ]


def _svg(title: str, body: list[str], height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def _steps_scale(lines, marks) -> Scale:
    low = min([line.x.min() for line in lines if len(line.x)])
    high = max([line.x.max() for line in lines if len(line.x)])
    if low == high:
        low, high = low - 1, high + 1
    return Scale(float(low), float(high), LEFT, WIDTH - RIGHT)


def _value_scale(lines: list[Line], log: bool, from_zero: bool) -> Scale:
    """Room for all points; on a linear axis, for all but the outermost hundredth of many raw
    ones.
    """
    inside = []
    for line in lines:
        y = line.y[np.isfinite(line.y)]
        if len(y):
            share = 0.005 if line.kind == "raw" and len(y) > 100 and not log else 0.0
            inside += np.quantile(y, [share, 1 - share]).tolist()
    low, high = min(inside), max(inside)
    if log:
        low, high = low / 1.1, high * 1.1
        if high / low < 2:
            low, high = low / 1.5, high * 1.5
        return Scale(low, high, HEIGHT - BOTTOM, TOP, log=True)
    # Never finer than a hundredth of the value, where labels would be long and the differences are
    # none.
    room = max(0.05 * (high - low), 0.01 * max(abs(high), abs(low))) or 1.0
    return Scale(0.0 if from_zero else low - room, high + room, HEIGHT - BOTTOM, TOP)


def _nice(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers in [low, high], evenly spaced by 1, 2 or 5 times a power of
    ten.
    """
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= most)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _value_ticks(scale: Scale, whole: bool = False) -> tuple[list[float], list[str], str]:
    """The ticks of a y axis, their labels, and the power of ten they share (for the title) or an
    empty text.
    """
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [
                f * 10.0**d
                for d in decades
                for f in factors
                if scale.low <= f * 10.0**d <= scale.high
            ]
            if len(ticks) >= 3:
                break
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
        return (
            ticks,
            [
                f"{t:g}" if 1e-3 <= t < 1e4 else f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e")
                for t in ticks
            ],
            "",
        )
    ticks = _nice(scale.low, scale.high, 6, whole)
    largest, step = (
        max(abs(t) for t in ticks),
        ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0,
    )
    if 0 < largest < 0.01:
        exponent = math.floor(math.log10(largest) + 1e-9)
        ten, power = 10.0**exponent, f" (&#215; 10{_superscript(exponent)})"
    else:
        size, unit = next(
            ((size, unit) for size, unit in UNITS if largest >= max(size, 1e4)), (1.0, "")
        )
        decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
        return ticks, [f"{t / size:,.{decimals}f}{unit}" if t else "0" for t in ticks], ""
    decimals = max(0, -math.floor(math.log10(step / ten) + 1e-9))
    return ticks, [f"{t / ten:.{decimals}f}" if t else "0" for t in ticks], power


def _bands(bands: list[Band], x: Scale) -> list[str]:
    out = []
    for i, band in enumerate(bands):
        start, stop = x.clamped(band.start), x.clamped(band.stop)
        out.append(
            f'<rect class="band{i % 2}" x="{_n(start)}" y="{TOP}" width="{_n(stop - start)}" '
            f'height="{HEIGHT - BOTTOM - TOP}"/>'
        )
        if i:
            out.append(f'<path class="border" d="M{_n(start)} {TOP}V{HEIGHT - BOTTOM}"/>')
        middle = _n((start + stop) / 2)
        if stop - start >= 62:  # what the words need in the larger letters of a phone
            words = (
                f'<tspan x="{middle}" dy="-1.1em">{escape(band.first)}</tspan>'
                f'<tspan x="{middle}" dy="1.1em">{escape(band.second)}</tspan>'
            )
        else:
            words = escape(band.short) if stop - start >= 36 else ""
        out.append(
            f'<text class="stage" x="{middle}" y="{TOP - 6}" text-anchor="middle">{words}</text>'
        )
    return out


def _draw(line: Line, x: Scale, y: Scale) -> str:
    """A path with gaps, thinned to the lowest and highest point of each column; single points as
    dots.
    """
    if line.kind == "held":
        return "".join(
            f'<circle class="held" cx="{_n(x(a))}" cy="{_n(y.clamped(b))}" r="4"/>'
            for a, b in zip(line.x, line.y)
            if math.isfinite(b)
        )
    keep = _thin(line)
    runs, current = [], []
    for i in keep:
        if math.isfinite(line.y[i]):
            current.append(f"{_n(x(line.x[i]))} {_n(_beyond(y(line.y[i])))}")
        elif current:
            runs.append(current)
            current = []
    runs += [current] if current else []
    path = "".join(f"M{'L'.join(run)}" for run in runs if len(run) > 1)
    dots = "".join(
        f'<circle class="{line.kind} dot" cx="{run[0].split()[0]}" cy="{run[0].split()[1]}" r="2.5"/>'
        for run in runs
        if len(run) == 1
    )
    inside = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - BOTTOM - TOP}"'
    # an inner svg clips to itself
    view = f'viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - BOTTOM - TOP}"'
    return (
        f'<svg {inside} {view}><path class="{line.kind}" d="{path}"/></svg>' if path else ""
    ) + dots


def _thin(line: Line) -> list[int]:
    n = len(line.x)
    if n <= 2 * COLUMNS:
        return list(range(n))
    keep = {0, n - 1}
    for column in np.array_split(np.arange(n), COLUMNS):
        y = line.y[column]
        if np.isfinite(y).any():
            keep |= {
                int(column[np.nanargmin(np.where(np.isfinite(y), y, np.nan))]),
                int(column[np.nanargmax(np.where(np.isfinite(y), y, np.nan))]),
            }
        if not np.isfinite(y).all():
            keep.add(int(column[np.flatnonzero(~np.isfinite(y))[0]]))
    return sorted(keep)


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    at = _n(x.clamped(mark.x))
    about = f"<title>{escape(mark.text)}</title>"
    if not math.isfinite(mark.y) or (y.log and mark.y <= 0):
        return f'<path class="{mark.kind} edge" d="M{at} {TOP + 8}l-5 -8h10z">{about}</path>'
    return (
        f'<circle class="{mark.kind}" cx="{at}" cy="{_n(y.clamped(mark.y))}" r="4">{about}</circle>'
    )


def _readings(readings: dict[str, Line], bands: list[Band], x: Scale) -> list[str]:
    """Strips over the plot that tell the values at their middle; the browser shows a title where
    the pointer rests.
    """
    if not readings:
        return []
    steps = next(iter(readings.values())).x
    chosen = np.unique(
        np.linspace(0, len(steps) - 1, min(READINGS, len(steps))).round().astype(int)
    )
    places = [x(float(steps[i])) for i in chosen]
    edges = [LEFT, *((a + b) / 2 for a, b in zip(places, places[1:])), WIDTH - RIGHT]
    out = []
    for i, left, right in zip(chosen, edges, edges[1:]):
        stage = [
            f"{band.first} {band.second}" for band in bands if band.start <= steps[i] <= band.stop
        ][-1:]
        told = [
            f"step {steps[i]:,.0f}",
            *stage,
            *(f"{name} {line.y[i]:.4g}" for name, line in readings.items()),
        ]
        out.append(
            f'<rect class="strip" x="{_n(left)}" y="{TOP}" width="{_n(right - left)}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(chr(10).join(told))}</title></rect>'
        )
    return out


def _superscript(number: int) -> str:
    raised = str.maketrans(
        "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
    )
    return str(number).translate(raised)


def _beyond(place: float) -> float:
    """A place far outside is brought to just outside: it is clipped there anyway."""
    return min(max(place, -HEIGHT), 2 * HEIGHT)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
