"""What the pictures of an evaluation share: a canvas with sharp text, as a PNG."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SCALE = 2                                    # pixels of the picture for one of the layout, for sharp text
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


def _scaled(values: Sequence[float]) -> list[float]:
    return [SCALE * value for value in values]


def _font(size: int):
    return ImageFont.load_default(size)
