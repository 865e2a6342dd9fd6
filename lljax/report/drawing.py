"""A canvas with sharp text, as a PNG."""

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # pixels of the picture for one of the layout, for sharp text
INK, FAINT = (32, 33, 36), (95, 99, 104)


class Canvas:
    """Places and sizes are in units of the layout, from the upper left corner."""

    def __init__(self, width: float, height: float):
        self._image = Image.new("RGB", (round(SCALE * width), round(SCALE * height)), "white")
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: Sequence[float], text: str, size: int, fill, anchor: str) -> None:
        self._draw.text(_scaled(at), text, font=_font(SCALE * size), fill=fill, anchor=anchor)

    def box(self, corners: Sequence[float], fill) -> None:
        self._draw.rectangle(_scaled(corners), fill=fill)

    def dot(self, at: Sequence[float], radius: float, fill) -> None:
        x, y = at
        self._draw.ellipse(_scaled((x - radius, y - radius, x + radius, y + radius)), fill=fill)

    def line(self, ends: Sequence[float], fill, width: float = 1) -> None:
        self._draw.line(_scaled(ends), fill=fill, width=round(SCALE * width))

    def png(self) -> bytes:
        out = io.BytesIO()
        self._image.save(out, "PNG", optimize=True)
        return out.getvalue()


def text_width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def ticks(low: float, high: float) -> list[float]:
    """Round places that cover [low, high], about six."""
    width = (high - low) / 5 or abs(low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(width))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if width <= power * factor)
    first = math.floor(low / step)
    return [step * n for n in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _scaled(values: Sequence[float]) -> list[float]:
    return [SCALE * value for value in values]


def _font(size: int):
    return ImageFont.load_default(size)
