"""The terminal that a script writes to, or the pipe or file in its place."""

import os

from rich.console import Console

UNBOUNDED = 10_000                           # columns where no window shows them: nothing is cut


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the window; in a pipe or a file as wide as COLUMNS says, or without bound.

    rich takes 80 columns for it otherwise, and cuts the tables.
    """
    made = Console(stderr=stderr)
    bounded = made.is_terminal or "COLUMNS" in os.environ
    return made if bounded else Console(stderr=stderr, width=UNBOUNDED)
