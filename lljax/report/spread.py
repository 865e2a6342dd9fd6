"""Values with their spread, a row each, as a PNG: dots for the values, a bar of a standard
deviation about their mean.
"""

import statistics
from collections.abc import Mapping, Sequence

from lljax.report.drawing import FAINT, INK, Canvas, text_width, ticks

ROW, TOP, BOTTOM, PLOT, GAP, RIGHT = 20, 40, 30, 380, 12, 70
BAR, DOT, GRID = (33, 102, 172), (140, 170, 205), (226, 228, 232)


def png(title: str, values: Mapping[str, Sequence[float]]) -> bytes:
    """values: of each row by its name; rows without any are left out."""
    rows = {name: each for name, each in values.items() if each}
    left = max(text_width(name, 12) for name in rows) + 2 * GAP
    low, high = (f(value for each in rows.values() for value in each) for f in (min, max))
    marks = ticks(low, high)
    low, high = marks[0], marks[-1]
    x = lambda value: left + PLOT * (min(max(value, low), high) - low) / (high - low)
    bottom = TOP + ROW * len(rows)
    canvas = Canvas(left + PLOT + RIGHT, bottom + BOTTOM)
    canvas.text((GAP, 18), title, 14, INK, "lm")
    for mark in marks:
        canvas.line((x(mark), TOP - 6, x(mark), bottom), GRID)
        canvas.text((x(mark), bottom + 14), f"{mark:g}", 11, FAINT, "mm")
    for number, (name, each) in enumerate(rows.items()):
        y, mean = TOP + ROW * (number + 0.5), statistics.fmean(each)
        canvas.text((left - GAP, y), name, 12, INK, "rm")
        for value in each:
            canvas.dot((x(value), y), 3, DOT)
        if len(each) > 1:
            about = statistics.stdev(each)
            canvas.line((x(mean - about), y, x(mean + about), y), BAR, 1.5)
        canvas.box((x(mean) - 1, y - 5, x(mean) + 1, y + 5), BAR)
        canvas.text((left + PLOT + GAP, y), f"{mean:.4g}", 11, FAINT, "lm")
    return canvas.png()
