"""The requests that are being written, on the device: rows with equally long caches, of models that
share a batch, form a lane.

A request begins in the lane of its prompt's length and moves to the next, twice as long, when its
lane is full, so that a short one does not pay for the length of a long one beside it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool

from lljax.generation import programs
from lljax.generation.completion import Growing
from lljax.generation.programs import Drawn, Rows
from lljax.generation.variants import Variants


@dataclasses.dataclass
class Active:
    """A request in a row of a lane. group: of its model, see `Variants`. slots: of its cache.
    drawn: tokens that the device has been asked for.
    """

    growing: Growing
    group: int
    slots: int
    row: int
    drawn: int = 1

    @property
    def place(self) -> tuple[int, int]:
        """Its lane."""
        return self.group, self.slots

    @property
    def wants_more(self) -> bool:
        return self.growing.reason is None and self.drawn < self.growing.request.tokens

    @property
    def reaches(self) -> int:
        """Slots that it takes once the token drawn last is read."""
        return len(self.growing.request.prompt) + self.drawn


@dataclasses.dataclass
class _Lane:
    """rows: on the device. taken: the request in each of them."""

    rows: Rows
    taken: list[Active | None]

    @property
    def active(self) -> list[Active]:
        return [active for active in self.taken if active is not None]

    @property
    def models(self) -> list[str | None]:
        """The model of each row; of an empty one any."""
        some = self.active[0]
        return [(active or some).growing.request.adapter for active in self.taken]

    def allowed(self) -> Bool[np.ndarray, "B V"] | None:
        """The tokens that may come next in each row; None if every row may take all."""
        constraints = {
            active.row: constraint
            for active in self.active
            if (constraint := active.growing.request.constraint) is not None
        }
        if not constraints:
            return None
        masks = np.ones((len(self.taken), self.rows.samplers.seen.shape[1]), bool)
        for row, constraint in constraints.items():
            masks[row] = constraint.allowed()
        return masks


class Lanes:
    """unit: the number of rows is a multiple of it."""

    def __init__(self, variants: Variants, unit: int):
        self._variants, self._unit = variants, unit
        self._lanes: dict[tuple[int, int], _Lane] = {}  # by group and slots

    @property
    def active(self) -> list[Active]:
        return [active for lane in self._lanes.values() for active in lane.active]

    def add(self, growing: Growing, row: Rows) -> Active:
        """Puts a request, whose prompt is read and first token drawn, into the lane of its cache.
        row: it alone.
        """
        group = self._variants.group(growing.request.adapter)
        active = Active(growing, group, row.cache.slots, row=0)
        self._put(active, row)
        return active

    def free(self, growing: Growing) -> None:
        """Frees the row of a request, if it has one."""
        for active in self.active:
            if active.growing is growing:
                self._leave(active)

    def decode(self) -> list[tuple[Drawn, list[tuple[Active, int]]]]:
        """Begins to draw the next token of every request that wants one: for each lane the tokens,
        and the rows of these requests.
        """
        for active in self.active:
            if active.wants_more and active.reaches > active.slots:
                self._move(active)
        drawn = []
        for lane in self._lanes.values():
            wanting = [active for active in lane.active if active.wants_more]
            if not wanting:
                continue
            self._shrink(lane)
            lane.rows, tokens = lane.rows.next(*self._variants.of_rows(lane.models), lane.allowed())
            drawn.append((tokens, [(active, active.row) for active in wanting]))
            for active in wanting:
                active.drawn += 1
        return drawn

    def compile(self, row: Rows, most: int) -> None:
        """Compiles what lanes of up to `most` rows with the cache of `row` run."""
        rows, count = row, self._unit
        while True:
            for models in self._variants.batches(count):
                rows, _ = rows.next(*self._variants.of_rows(models), None)
            programs.grow(programs.take(rows, np.zeros(self._unit, np.int32)), 2 * row.cache.slots)
            if count >= most:
                return
            wide = programs.take(rows, np.zeros(2 * count, np.int32))
            programs.take(wide, np.zeros(count, np.int32))
            alone = programs.take(rows, np.zeros(self._unit, np.int32))
            rows, count = programs.put(wide, alone, np.int32(0)), 2 * count

    def _put(self, active: Active, row: Rows) -> None:
        lane = self._lanes.get(active.place)
        if lane is None:
            lane = self._lanes[active.place] = _Lane(row, [None] * self._unit)
        elif None not in lane.taken:
            self._arrange(lane, 2 * len(lane.taken))
        active.row = lane.taken.index(None)
        lane.taken[active.row] = active
        if lane.rows is not row:
            lane.rows = programs.put(lane.rows, row, np.int32(active.row))

    def _leave(self, active: Active) -> None:
        lane = self._lanes[active.place]
        lane.taken[active.row] = None
        if not lane.active:
            del self._lanes[active.place]

    def _move(self, active: Active) -> None:
        """Into the lane with twice the slots."""
        numbers = np.full(self._unit, active.row, np.int32)
        row = programs.take(self._lanes[active.place].rows, numbers)
        self._leave(active)
        active.slots *= 2
        self._put(active, programs.grow(row, active.slots))

    def _shrink(self, lane: _Lane) -> None:
        """Halves the rows while a quarter of them or less is taken."""
        while len(lane.taken) > self._unit and 4 * len(lane.active) <= len(lane.taken):
            self._arrange(lane, len(lane.taken) // 2)

    def _arrange(self, lane: _Lane, rows: int) -> None:
        """Gives the lane `rows` rows, its requests in the first of them."""
        active = lane.active
        numbers = np.zeros(rows, np.int32)
        numbers[: len(active)] = [request.row for request in active]
        lane.rows = programs.take(lane.rows, numbers)
        lane.taken = [*active, *[None] * (rows - len(active))]
        for row, request in enumerate(active):
            request.row = row
