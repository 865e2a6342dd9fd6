"""Scores by length, a line for each model, as a PNG."""

import bisect
import math
from collections.abc import Mapping

from lljax.evaluation.drawing import FAINT, INK, Canvas, text_width, ticks
from lljax.training.charts import short_length

LEFT, TOP, HIGH, WIDE, BOTTOM, GAP, ROW, RIGHT = 52, 44, 190, 84, 44, 12, 20, 18
GRID = (226, 228, 232)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (120, 120, 120))   # Okabe and Ito's


def png(title: str, scores: Mapping[str, Mapping[int, float]], *, log: bool = False) -> bytes:
    """scores: of each model by its name, by length in tokens; one that is NaN is a gap. log: the scores are above 0, and their
    axis is logarithmic; otherwise it reaches from 0 to 100 at least. The places of lengths are as far apart whatever is between
    them. With more models than COLOURS the colours come again."""
    lengths = sorted({length for each in scores.values() for length in each})
    told = [score for each in scores.values() for score in each.values() if math.isfinite(score)]
    marks = _powers(min(told), max(told)) if log else ticks(min(*told, 0), max(*told, 100))
    place = math.log if log else float
    low, high = place(marks[0]), place(marks[-1])
    x = lambda length: LEFT + WIDE * (lengths.index(length) + 0.5)
    y = lambda score: TOP + HIGH * (high - place(score)) / (high - low)
    right, bottom = LEFT + WIDE * len(lengths), TOP + HIGH
    names = right + 2 * GAP
    canvas = Canvas(max(names + GAP + max(text_width(name, 12) for name in scores), LEFT + text_width(title, 14)) + RIGHT,
                    max(bottom, TOP + ROW * len(scores)) + BOTTOM)
    canvas.text((LEFT, 18), title, 14, INK, "lm")
    for mark in marks:
        canvas.line((LEFT, y(mark), right, y(mark)), GRID)
        canvas.text((LEFT - 8, y(mark)), f"{mark:g}", 11, FAINT, "rm")
    for length in lengths:
        canvas.text((x(length), bottom + 14), short_length(length), 12, INK, "mm")
    canvas.text(((LEFT + right) / 2, bottom + 32), "length in tokens", 11, FAINT, "mm")
    for number, (name, each) in enumerate(scores.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(x(length), y(each[length])) if math.isfinite(each.get(length, math.nan)) else None for length in lengths]
        for point, after in zip(points, [*points[1:], None]):
            if point and after:
                canvas.line((*point, *after), colour, 2)
            if point:
                canvas.dot(point, 3, colour)
        canvas.dot((names, TOP + ROW * (number + 0.5)), 4, colour)
        canvas.text((names + GAP, TOP + ROW * (number + 0.5)), name, 12, INK, "lm")
    return canvas.png()


def _powers(low: float, high: float) -> list[float]:
    """Round places that cover [low, high], from the largest at or below it to the smallest above."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    places = [factor * 10.0 ** power for power in powers for factor in (1, 1.5, 2, 3, 5, 7)]
    return places[bisect.bisect_right(places, low) - 1:bisect.bisect_right(places, high) + 1]
