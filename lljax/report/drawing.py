"""matplotlib figures as SVG for the page and as PNG for documents.

A figure uses the light theme's colors of COLORS. In the SVG they become the CSS variables of
report.css, so that a chart follows the page into the dark theme. Text stays text, in the page's
font. The same figure gives the same bytes.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 560, 276  # of a chart, in points: units of the SVG's viewBox
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 54, 40  # margins around the plot
PLOT = WIDTH - LEFT - RIGHT

COLORS = {  # CSS variable: value in the light theme
    "card": "#ffffff",
    "text": "#1b2330",
    "muted": "#596375",
    "line": "#dfe3ea",
    "curve": "#2060c8",
    "held": "#b35c00",
    "alarm": "#c8202f",
    "band": "#eef1f6",
    "cold": "#4a90d0",
    "warm": "#dd5a4a",
    "series0": "#0072b2",
    "series1": "#d55e00",
    "series2": "#009e73",
    "series3": "#b04a8a",
    "series4": "#3d9fd6",
    "series5": "#6b6b6b",
}
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "lljax"}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_SETTINGS_LOCK = threading.Lock()  # matplotlib's settings belong to the process


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with _SETTINGS_LOCK, matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font draws it
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def describe(artist: "Artist", kind: str, text: str) -> None:
    """Gives an artist a CSS class and the text to show while the pointer rests on it."""
    artist.set_gid(f"{kind}|{printable_text(text)}")


def printable_text(text: str) -> str:
    """`text` without the lone surrogates and control characters that no font and no XML has."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", text)


def svg(figure: "Figure", title: str) -> str:
    """The figure as an `<svg>` element with an accessible name, to stand in an HTML page."""
    file = io.StringIO()
    with _settings():
        figure.savefig(file, format="svg", metadata=NO_METADATA, transparent=True)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(printable_text(title))}">{_cleaned(file.getvalue())}</svg>'
    )


def _cleaned(text: str) -> str:
    """The contents of matplotlib's `<svg>`: without its style sheet, fonts, ids of groups and spare
    decimals, with the theme's variables as colors and the texts of `describe` as titles.
    """
    text = text[text.index("<svg") :]
    text = text[text.index(">") + 1 : text.rindex("</svg>")]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    text = re.sub(r' transform="rotate\(-0[^"]*\)"', "", text)
    text = re.sub(
        r' (?:d|x|y|width|height)="[^"]*"',
        lambda match: re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.1f}", match[0]),
        text,
    )
    text = re.sub(r'<g id="(\w+)\|([^"]*)">', r'<g class="\1"><title>\2</title>', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()


def png(figure: "Figure", scale: float = 2.0) -> bytes:
    """The figure as a PNG on white, with `scale` pixels for a point."""
    file = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}
    with _settings():
        figure.savefig(file, format="png", dpi=72 * scale, facecolor="white", metadata=metadata)
    return file.getvalue()
