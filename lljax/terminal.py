"""The console on which scripts print their tables."""

import sys

from rich.console import Console

WIDE = 400                                   # columns in a file or a pipe: wider than any table


def console(least: int = 0) -> Console:
    """A console as wide as the terminal, at least `least` columns.

    In a file or a pipe rich would take 80 columns and cut tables: there it is WIDE.
    """
    return Console(width=max(Console().width, least) if sys.stdout.isatty() else WIDE)
