"""The parts of a report page, as data that the template lays out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lljax.errors import first_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fact:
    """A labeled value. `before` is the value that training started from, if there is one."""

    label: str
    value: str
    note: str = ""
    before: str | None = None


@dataclass(frozen=True)
class Table:
    """`columns` names the cells of every row; a cell is a number, a string or None (missing)."""

    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a figure's legend. `swatch` is a CSS class of the page, "" for text alone."""

    swatch: str
    text: str


@dataclass(frozen=True)
class Figure:
    """An inline SVG of `lljax.report.drawing.svg`, "" where there was nothing to draw."""

    svg: str
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Image:
    """A PNG as a data URI, shown `width` CSS pixels wide."""

    source: str
    title: str
    width: int


@dataclass(frozen=True)
class Command:
    title: str
    line: str


@dataclass
class Section:
    """A card of the page: whatever it has is shown in the order of these fields."""

    title: str = ""
    facts: list[Fact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    def guarded(
        self, source: str, make: Callable[..., Result | None], *arguments: Any
    ) -> Result | None:
        """`make(*arguments)`, or None and a note if it raises: a damaged `source` costs its part of
        the page and no more.
        """
        try:
            return make(*arguments)
        except Exception as error:
            logging.warning(
                "a damaged part of %s is left out: %s (%s)",
                source,
                first_line(error),
                type(error).__name__,
            )
            self.notes.append(f"A part of {source} is damaged and left out.")
            return None

    def extend(
        self, target: list, source: str, make: Callable[[Any], Any | None], items: Any
    ) -> None:
        """Appends `make(item)` of every item to `target`, each guarded; `items` that are not a list
        are ignored.
        """
        for item in items if isinstance(items, list) else ():
            part = self.guarded(source, make, item)
            if part is not None:
                target.append(part)

    def __bool__(self) -> bool:
        return any(value for name, value in vars(self).items() if name != "title")
