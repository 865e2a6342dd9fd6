"""A grid of scores, length by depth, as a PNG."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lljax.training.charts import short_length

SCALE = 2                                    # pixels of the picture for one of the layout, for sharp text
CELL, LEFT, TOP, RIGHT, BOTTOM = (64, 34), 74, 48, 18, 46
INK, FAINT, NOTHING = (32, 33, 36), (95, 99, 104), (236, 238, 240)
# From 0 by 50 to 100: two hues that every eye tells apart, and light where they meet.
COLOURS = np.array([(178, 24, 43), (250, 236, 214), (33, 102, 172)])


def png(title: str, lengths: Sequence[int], depths: Sequence[int], scores: np.ndarray) -> bytes:
    """scores: 0 to 100, [depths, lengths], NaN where there is none. Depths in percent, from the top; lengths in tokens."""
    (wide, high), rows, columns = CELL, len(depths), len(lengths)
    least = LEFT + RIGHT + math.ceil(_font(14).getlength(title))
    size = max(LEFT + wide * columns + RIGHT, least), TOP + high * rows + BOTTOM
    image = Image.new("RGB", tuple(SCALE * x for x in size), "white")
    draw = ImageDraw.Draw(image)
    middle = LEFT + wide * columns / 2
    _write(draw, (LEFT, 20), title, 14, INK, "lm")
    _write(draw, (middle, size[1] - 12), "length in tokens", 11, FAINT, "mm")
    _write(draw, (LEFT - 8, TOP - 9), "depth", 11, FAINT, "rm")
    for row, depth in enumerate(depths):
        y = TOP + high * row
        _write(draw, (LEFT - 8, y + high / 2), f"{depth}%", 12, INK, "rm")
        for column in range(columns):
            x, score = LEFT + wide * column, float(scores[row][column])
            fill = colour(score)
            draw.rectangle([SCALE * v for v in (x + 1, y + 1, x + wide - 1, y + high - 1)], fill=fill)
            bright = np.dot(fill, (0.299, 0.587, 0.114)) > 140
            _write(draw, (x + wide / 2, y + high / 2), "-" if math.isnan(score) else f"{score:.0f}", 13,
                   INK if bright else "white", "mm")
    for column, length in enumerate(lengths):
        _write(draw, (LEFT + wide * (column + 0.5), TOP + high * rows + 13), short_length(length), 12, INK, "mm")
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def colour(score: float) -> tuple[int, int, int]:
    if math.isnan(score):
        return NOTHING
    return tuple(round(float(np.interp(score, (0, 50, 100), channel))) for channel in COLOURS.T)


def _font(size: int):
    return ImageFont.load_default(size)


def _write(draw, at, text, size, fill, anchor) -> None:
    draw.text((SCALE * at[0], SCALE * at[1]), text, font=_font(SCALE * size), fill=fill, anchor=anchor)
