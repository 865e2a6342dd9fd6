"""Where scripts print their tables."""

import sys

from rich.console import Console

WIDE = 400                                   # columns where nobody's window ends


def console(least: int = 0) -> Console:
    """A console of the terminal's width, or of `least` columns if that is more; as wide as tables become in a file or a
    pipe, where rich would take 80 and cut them."""
    terminal = Console()
    return Console(width=max(terminal.width, least) if sys.stdout.isatty() else WIDE)
