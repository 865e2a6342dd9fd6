"""Groups: a prompt that is read once, and its answers, in one row of a batch.

The tokens of a group are the trunk, which all answers begin with, and one branch for each answer.
In a piece, every branch begins with a copy of the trunk's last token, so that the first token of
each answer has a target of its own:

    stored    tokens    p q r | a b | c d      branches  0 0 0 1 1 2 2
    piece     tokens    p q | r a | r c        targets   - - a b c d
              branches  0 0 | 1 1 | 2 2        positions 0 1 2 3 2 3
"""

from typing import Any

import numpy as np

from lljax.data.batch import IGNORED, NEXT_TOKEN, Field
from lljax.data.preferences import MISMATCHED, ROLES, Group
from lljax.data.prompts import check_overlong, middle_cut
from lljax.data.template import encode
from lljax.data.token_store import SHARES, Encoded, TokenStore

NEIGHBORS = 8  # groups after a group among which its mismatched answer is looked for


def encode_group(group: Group, tokenizer: Any, loss_on: str) -> Encoded:
    """The trunk and the answers of a group, with the branch of each token: 0, or the answer's role.

    The trunk is the longest common prefix of the answers' tokens that holds no trained token.

    loss_on: not used; the tokens of the answers are trained, and of the prompt none.

    Raises:
      ValueError: as `encode`; or two answers have the same tokens.
      ModelError: as `encode`.
    """
    roles = [role for role, _ in group.answers]
    answers = [encode(document, tokenizer, "assistant") for _, document in group.answers]
    n = min(int(np.argmax(mask)) for _, mask in answers)
    first = answers[0][0]
    for tokens, _ in answers[1:]:
        shorter = min(len(first), len(tokens))
        differs = np.flatnonzero(first[:shorter] != tokens[:shorter])
        if not len(differs) and len(first) == len(tokens):
            raise ValueError("the chosen and the rejected answer have the same tokens")
        n = min(n, int(differs[0]) if len(differs) else shorter)
    lengths = [n, *(len(tokens) - n for tokens, _ in answers)]
    return Encoded(
        np.concatenate([first[:n], *(tokens[n:] for tokens, _ in answers)]),
        np.concatenate([np.zeros(n, bool), *(mask[n:] for _, mask in answers)]),
        branches=np.repeat(np.asarray([0, *roles], np.uint8), lengths),
    )


def branch_positions(piece: dict[str, np.ndarray]) -> np.ndarray:
    """The position of each token of a piece in its own sequence, trunk and branch, int32 [n]."""
    branches = np.asarray(piece["branches"])
    index = np.arange(len(branches))
    starts = np.flatnonzero(np.diff(branches, prepend=0))  # of the branches
    trunk = int((branches == 0).sum())
    offsets = np.zeros(len(branches), np.int64)
    for start in starts:
        offsets[start:] = start - trunk
    return (index - offsets).astype(np.int32)


# The fields of an objective whose rows are groups.
ANSWERS = (*NEXT_TOKEN, Field("branches"), Field("positions", derive=branch_positions))


class GroupPieces:
    """Groups of at most T tokens, each with the fields of `ANSWERS` but for the positions; a
    random-access source for grain. A group is never split.

    overlong: longer groups are left out ("drop"), or the middle of their trunk is ("truncate");
      groups whose answers alone are longer are left out in either case.
    mismatched: every group also has the answer of another group, as the branch MISMATCHED: of the
      next group of another prompt and answer. Groups without room for it have none.

    Raises:
      ConfigError: another value of `overlong`.
    """

    def __init__(self, store: TokenStore, T: int, overlong: str, *, mismatched: bool = False):
        check_overlong(overlong, "groups of answers")
        self.store, self.T = store, T
        starts, stops = store.offsets[:-1], store.offsets[1:]
        # Branches ascend within a group.
        ends = [_first_above(store.branching, starts, stops, role) for role in (0, *ROLES)]
        self._ends = np.stack([starts, *ends], axis=1) - starts[:, None]
        sizes = np.diff(self._ends, axis=1)  # [groups, 1 + roles]
        trunk = sizes[:, 0]
        answers = (sizes[:, 1:] > 0).sum(1)
        shared = trunk > 0  # otherwise the first token of each answer has no target
        fixed = np.where(shared, sizes[:, 1:].sum(1), sizes[:, 1:].sum(1) - answers)
        other, extra = np.full(len(store), -1), np.zeros(len(store), np.int64)
        if mismatched:
            other = self._others(trunk, sizes[:, 1:])
            own = np.argmax(sizes[:, 1:] > 0, axis=1)
            extra = np.where(other >= 0, sizes[other, 1 + own[other]] - ~shared, 0)
        least = fixed + (np.maximum(trunk - 1, 0) if overlong == "drop" else 0)
        fits = least <= T
        extra = np.where(least + extra <= T, extra, 0)
        self.document = np.flatnonzero(fits)
        self.other = np.where(extra > 0, other, -1)[fits]
        # Of a trunk, this many tokens are read; the last of them with every answer.
        self.trunk = np.minimum(trunk, np.maximum(T - fixed - extra + 1, 0))[fits]
        self._cut = int((self.trunk < trunk[fits]).sum())
        self._tokens = int((np.maximum(self.trunk - 1, 0) + (fixed + extra)[fits]).sum())
        self._mismatched = mismatched

    def _others(self, trunk: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """For each group the number of the group that its mismatched answer is of, or -1."""
        n = len(trunk)
        first = answers[np.arange(n), np.argmax(answers > 0, axis=1)]
        following = np.roll(np.arange(n), -1)
        # Sequences of different lengths differ; others are compared.
        different = (trunk != trunk[following]) & (first != first[following])
        for i in np.flatnonzero(~different).tolist():
            neighbors = ((i + step) % n for step in range(1, min(n, NEIGHBORS + 1)))
            following[i] = next((j for j in neighbors if self._differ(i, j)), -1)
        return following

    def _differ(self, i: int, j: int) -> bool:
        """Whether groups i and j have different prompts and different first answers."""
        (a, x), (b, y) = self._first(i), self._first(j)
        return not np.array_equal(a, b) and not np.array_equal(x, y)

    def _first(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the trunk and of the first answer of group i."""
        tokens, (_, trunk) = self.store.tokens(i), self._ends[i, :2]
        start, stop = self._span(i)
        return tokens[:trunk], tokens[start:stop]

    def _span(self, i: int) -> tuple[int, int]:
        """The first answer of group i, in its tokens."""
        ends = self._ends[i, 1:]
        at = int(np.argmax(np.diff(ends) > 0))
        return int(ends[at]), int(ends[at + 1])

    def counts(self) -> dict[str, int]:
        """The numbers of `documents` (groups), of groups `dropped` or `truncated` for their length,
        of `pieces`, and of `tokens` in them; `unmatched`: groups without a mismatched answer.
        """
        counts = {
            "documents": len(self),
            "dropped": len(self.store) - len(self),
            "truncated": self._cut,
            "untrained": 0,
            "pieces": len(self),
            "tokens": self._tokens,
        }
        return counts | ({"unmatched": int((self.other < 0).sum())} if self._mismatched else {})

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        group, other = int(self.document[i]), int(self.other[i])
        tokens, mask = self.store.tokens(group), self.store.mask(group)
        ends = self._ends[group]
        trunk = tokens[: ends[1]][middle_cut(int(ends[1]), int(self.trunk[i]))]
        parts = [(trunk[:-1], np.full(max(len(trunk) - 1, 0), IGNORED), 0)]
        for role, start, stop in zip(ROLES, ends[1:], ends[2:], strict=False):
            if start < stop:
                parts.append((*_branch(trunk, tokens[start:stop], mask[start:stop]), role))
        if other >= 0:
            start, stop = self._span(other)
            answer, trained = self.store.tokens(other), self.store.mask(other)
            parts.append((*_branch(trunk, answer[start:stop], trained[start:stop]), MISMATCHED))
        return {
            "tokens": np.concatenate([part[0] for part in parts]).astype(np.int32),
            "targets": np.concatenate([part[1] for part in parts]).astype(np.int32),
            "branches": np.repeat([part[2] for part in parts], [len(part[0]) for part in parts]),
        }

    def __repr__(self) -> str:  # grain names the source of an iterator state by it
        kind = "with mismatched answers, " if self._mismatched else ""
        return f"GroupPieces({kind}{len(self)} of {self.T})"


def _branch(
    trunk: np.ndarray, answer: np.ndarray, trained: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets of an answer: the trunk's last token predicts its first token."""
    inputs = np.concatenate([trunk[-1:], answer[:-1]])
    targets = np.where(trained, answer.astype(np.int64), IGNORED)
    return inputs, targets[len(targets) - len(inputs) :]


def _first_above(
    values: np.ndarray, starts: np.ndarray, stops: np.ndarray, limit: int
) -> np.ndarray:
    """The first index of each span [start, stop) of ascending values whose value is above `limit`,
    or its stop; all spans are bisected at once.
    """
    low, high = starts.copy(), stops.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        above = np.zeros(len(low), bool)
        above[open_] = values[middle[open_]] > limit
        high = np.where(open_ & above, middle, high)
        low = np.where(open_ & ~above, middle + 1, low)
    return low


def group_statistics(store: TokenStore) -> dict[str, Any]:
    """What a store of groups adds to data_statistics.json.

    answers: for each role, their number, tokens, and quantiles of their lengths. read_once: tokens
    of prompts that are read once instead of once for each answer.
    """
    if not len(store):
        return {"answers": {}, "read_once": 0}
    starts, stops = store.offsets[:-1], store.offsets[1:]
    ends = [_first_above(store.branching, starts, stops, role) for role in (0, *ROLES)]
    trunk, *answers = np.diff(np.stack([starts, *ends]), axis=0)
    found, count = {}, np.zeros(len(store), np.int64)
    for name, lengths in zip(ROLES.values(), answers, strict=True):
        count += lengths > 0
        if len(filled := lengths[lengths > 0]):
            found[name] = {
                "answers": len(filled),
                "tokens": int(filled.sum()),
                "lengths": {f"p{round(100 * q)}": int(np.quantile(filled, q)) for q in SHARES}
                | {"max": int(filled.max())},
            }
    return {"answers": found, "read_once": int((trunk * (count - 1)).sum())}
