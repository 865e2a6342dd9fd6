"""Tables of the page: limits on their size, and how the template shows a cell."""

from typing import Any, NamedTuple

from lljax.report.content import Table
from lljax.report.numbers import MISSING, four_figures

MOST_ROWS, MOST_COLUMNS, LONGEST_CELL = 1000, 64, 300


class Cell(NamedTuple):
    text: str
    numeric: bool


def clipped(value: Any, longest: int = LONGEST_CELL) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def table_of(row: dict[str, Any]) -> Table:
    """A table of evaluation.json, {"columns", "rows", "caption"}, within the limits of a page."""
    rows, caption = row["rows"], clipped(row.get("caption", ""), 10 * LONGEST_CELL)
    if len(rows) > MOST_ROWS:
        caption += f" (the first {MOST_ROWS:,} of {len(rows):,} rows)"
    return Table(
        columns=[clipped(name) for name in row["columns"][:MOST_COLUMNS]],
        rows=[list(cells[:MOST_COLUMNS]) for cells in rows[:MOST_ROWS]],
        caption=caption,
    )


def cell(value: Any) -> Cell:
    """The text of a cell, and whether it is aligned as a number."""
    if value is None:
        return Cell(MISSING, True)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Cell(four_figures(value), True)
    return Cell(clipped(value), is_numeric(value))


def numeric_column(rows: list[list[Any]], number: int) -> bool:
    return all(is_numeric(row[number]) for row in rows if number < len(row))


def is_numeric(value: Any) -> bool:
    """Whether a cell holds a number or stands for a missing one; formatted numbers ("1,024",
    "3.50 (n=5)", "nan") count.
    """
    if value in (None, MISSING):
        return True
    if isinstance(value, bool):
        return False
    try:
        float(str(value).partition(" (n=")[0].replace(",", ""))
    except ValueError:
        return False
    return True
