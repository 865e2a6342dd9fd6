"""The rows of a rollout: which prompts fit a batch, and the batch of their answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lljax.data.batch import IGNORED
from lljax.data.packing import with_fields
from lljax.objectives.policy import ADVANTAGES, FIELDS
from lljax.parallel.rounding import cdiv


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a prompt. tokens: int32, with the token that ended it. trains: whether it has
    targets.
    """

    tokens: np.ndarray
    advantage: float
    trains: bool


@dataclasses.dataclass(frozen=True)
class Share:
    """Answers of a prompt that share a row with it. prompt: its number in the rollout. answers:
    their numbers.
    """

    row: int
    prompt: int
    answers: range


class RowPlan:
    """Places prompts with the longest answers that they may get into rows of T tokens, first-fit.
    A prompt that does not fit a row with all of its answers stands in several rows.

    packing: rows may hold several prompts.
    """

    def __init__(self, *, rows: int, T: int, answers: int, longest: int, packing: bool):
        self._free, self._T, self._packing = [T] * rows, T, packing
        self._answers, self._longest = answers, longest
        self.shares: list[Share] = []
        self.prompts = 0

    def sizes(self, n: int) -> list[int]:
        """How many answers of a prompt of n tokens stand in each of its rows; empty if it never
        fits.
        """
        room = (self._T - (n - 1)) // self._longest
        parts = cdiv(self._answers, room) if room > 0 else len(self._free) + 1
        if parts > len(self._free):
            return []
        return [len(part) for part in np.array_split(np.arange(self._answers), parts)]

    def add(self, n: int) -> bool:
        """Places the next prompt, of n tokens; False if there is no room left for it."""
        free, shares, first = list(self._free), [], 0
        for count in self.sizes(n):
            size = n - 1 + count * self._longest
            row = next((i for i, room in enumerate(free) if room >= size), None)
            if row is None:
                return False
            free[row] = free[row] - size if self._packing else 0
            shares.append(Share(row, self.prompts, range(first, first + count)))
            first += count
        self._free = free
        self.shares += shares
        self.prompts += 1
        return True


def batch_of(
    shares: Sequence[Share],
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[Answer]],
    *,
    rows: int,
    T: int,
) -> dict[str, np.ndarray]:
    """A batch [rows, T] with the fields of a policy objective, segments and positions.

    answers: of every prompt. Every branch begins with the last token of its prompt, as in
    lljax.data.groups.
    """
    pieces: list[list[dict[str, np.ndarray]]] = [[] for _ in range(rows)]
    for share in shares:
        own = [answers[share.prompt][number] for number in share.answers]
        pieces[share.row].append(_piece(prompts[share.prompt], own))
    made = [_row(row, T) for row in pieces]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def _piece(prompt: np.ndarray, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    trunk = len(prompt) - 1
    lengths = [len(answer.tokens) for answer in answers]
    targets = [a.tokens if a.trains else np.full(len(a.tokens), IGNORED) for a in answers]
    return {
        "tokens": np.concatenate(
            [prompt[:-1], *(x for a in answers for x in (prompt[-1:], a.tokens[:-1]))]
        ),
        "targets": np.concatenate([np.full(trunk, IGNORED), *targets]),
        "branches": np.repeat(np.arange(len(answers) + 1), [trunk, *lengths]),
        ADVANTAGES: np.repeat([0.0, *(a.advantage for a in answers)], [trunk, *lengths]),
    }


def _row(pieces: Sequence[dict[str, np.ndarray]], T: int) -> dict[str, np.ndarray]:
    """A row of T tokens that holds the pieces, one after the other, and padding."""
    filled = [with_fields(piece, FIELDS) for piece in pieces]
    lengths = [len(piece["tokens"]) for piece in pieces]
    padding = T - sum(lengths)
    row = {
        field.name: np.concatenate(
            [
                *(piece[field.name] for piece in filled),
                np.full(padding, field.padding, field.dtype),
            ]
        )
        for field in FIELDS
    }
    numbers = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
    return row | {"segments": np.pad(numbers, (0, padding))}
