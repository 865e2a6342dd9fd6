"""A grid of scores, length by depth, as a PNG."""

import math
from collections.abc import Sequence

import numpy as np

from lljax.evaluation.drawing import FAINT, INK, Canvas, text_width
from lljax.training.charts import short_length

CELL, LEFT, TOP, RIGHT, BOTTOM = (64, 34), 74, 48, 18, 46
NOTHING = (236, 238, 240)
# From 0 by 50 to 100: two hues that every eye tells apart, and light where they meet.
COLOURS = np.array([(178, 24, 43), (250, 236, 214), (33, 102, 172)])


def png(title: str, lengths: Sequence[int], depths: Sequence[int], scores: np.ndarray) -> bytes:
    """scores: 0 to 100, [depths, lengths], NaN where there is none. Depths in percent, from the top; lengths in tokens."""
    (wide, high), rows, columns = CELL, len(depths), len(lengths)
    width, height = max(LEFT + wide * columns, LEFT + math.ceil(text_width(title, 14))) + RIGHT, TOP + high * rows + BOTTOM
    canvas = Canvas(width, height)
    canvas.text((LEFT, 20), title, 14, INK, "lm")
    canvas.text((LEFT + wide * columns / 2, height - 12), "length in tokens", 11, FAINT, "mm")
    canvas.text((LEFT - 8, TOP - 9), "depth", 11, FAINT, "rm")
    for row, depth in enumerate(depths):
        y = TOP + high * row
        canvas.text((LEFT - 8, y + high / 2), f"{depth}%", 12, INK, "rm")
        for column in range(columns):
            x, score = LEFT + wide * column, float(scores[row][column])
            fill = colour(score)
            canvas.box((x + 1, y + 1, x + wide - 1, y + high - 1), fill)
            bright = np.dot(fill, (0.299, 0.587, 0.114)) > 140
            canvas.text((x + wide / 2, y + high / 2), "-" if math.isnan(score) else f"{score:.0f}", 13,
                        INK if bright else "white", "mm")
    for column, length in enumerate(lengths):
        canvas.text((LEFT + wide * (column + 0.5), TOP + high * rows + 13), short_length(length), 12, INK, "mm")
    return canvas.png()


def colour(score: float) -> tuple[int, int, int]:
    if math.isnan(score):
        return NOTHING
    return tuple(round(float(np.interp(score, (0, 50, 100), channel))) for channel in COLOURS.T)

