"""The terminal that a script writes to, or the pipe or file in its place."""

import os

from rich.console import Console

UNBOUNDED = 10_000                           # columns of what no window shows: nothing is cut or broken there


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the window; where there is none (a pipe, a file) and COLUMNS says nothing, without a bound.

    rich takes 80 columns for it otherwise, and cuts the tables.
    """
    made = Console(stderr=stderr)
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=UNBOUNDED)
