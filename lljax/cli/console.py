"""The terminal that a script writes to, or the pipe or file in its place."""

import os

from rich.console import Console

UNBOUNDED = 10_000  # columns of a pipe or a file, where nothing is cut


def console(least: int = 0, *, stderr: bool = False) -> Console:
    """A console as wide as the window, at least `least` columns.

    In a pipe or a file, where rich would take 80 columns and cut tables, it is UNBOUNDED unless
    COLUMNS says otherwise.
    """
    window = Console(stderr=stderr)
    if not window.is_terminal and "COLUMNS" not in os.environ:
        return Console(stderr=stderr, width=UNBOUNDED)
    return Console(stderr=stderr, width=max(window.width, least))
