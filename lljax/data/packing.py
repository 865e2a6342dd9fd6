"""Documents cut into pieces that fit a row, and pieces packed first-fit into rows."""

import grain
import numpy as np

from lljax.data.batch import IGNORED, NEXT_TOKEN, Field
from lljax.data.token_store import TokenStore
from lljax.parallel.rounding import cdiv

BINS = 16  # rows filled at the same time; more leave less padding and mix epochs more


class Pieces:
    """Documents in pieces of at most T tokens; a random-access source for grain.

    A piece holds its inputs and their targets, so that a split loses no target: the last input of a
    piece predicts the first token of the next piece. Pieces without any target are left out.

    overlong: documents longer than T are "split" into consecutive pieces, or "truncate", or "drop".
    """

    def __init__(self, store: TokenStore, T: int, overlong: str):
        self.store, self.T = store, T
        fits = np.flatnonzero(store.lengths <= T) if overlong == "drop" else np.arange(len(store))
        pieces = (
            cdiv(store.lengths[fits], T) if overlong == "split" else np.ones(len(fits), np.int64)
        )
        document = np.repeat(fits, pieces)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * T
        # A piece of inputs [start, start + T) has the targets [start + 1, start + T + 1).
        first = store.offsets[document] + start + 1
        trains = _any(store.trained, first, np.minimum(first + T, store.offsets[document + 1]))
        self.document, self.start = document[trains], start[trains]
        self._dropped = len(store) - len(fits)

    def counts(self) -> dict[str, int]:
        """The numbers of trained `documents`, of documents `dropped` for their length and
        `untrained` because no piece has a target, of `pieces`, and of `tokens` in them.
        """
        documents = len(np.unique(self.document))
        tokens = np.minimum(self.store.lengths[self.document] - self.start, self.T).sum()
        untrained = len(self.store) - self._dropped - documents
        return {
            "documents": documents,
            "dropped": self._dropped,
            "untrained": untrained,
            "pieces": len(self),
            "tokens": int(tokens),
        }

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        document, start = int(self.document[i]), int(self.start[i])
        tokens, mask = self.store.tokens(document), self.store.mask(document)
        inputs = tokens[start : start + self.T].astype(np.int32)
        following, trained = (
            tokens[start + 1 : start + self.T + 1],
            mask[start + 1 : start + self.T + 1],
        )
        targets = np.full(len(inputs), IGNORED, np.int32)
        targets[: len(following)] = np.where(trained, following.astype(np.int32), IGNORED)
        return {"tokens": inputs, "targets": targets}

    def __repr__(self) -> str:  # grain names the source of an iterator state by it
        return f"Pieces({len(self)} of {self.T})"


def _any(flags: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Whether any of flags[start:stop] is set, bool [n]; spans ascend and do not overlap."""
    result, filled = np.zeros(len(start), bool), np.flatnonzero(start < stop)
    if len(filled):
        bounds = np.stack([start[filled], stop[filled]], axis=1).ravel()
        bounds = bounds[:-1] if bounds[-1] == len(flags) else bounds
        result[filled] = np.logical_or.reduceat(flags, bounds)[::2]
    return result


def pack(
    pieces: grain.IterDataset,
    T: int,
    *,
    packing: bool,
    fields: tuple[Field, ...] = NEXT_TOKEN,
) -> grain.IterDataset:
    """Rows of T tokens, of several pieces each (first-fit) or of one piece, with the `fields`,
    segment ids (0: padding) and positions: those of the `fields`, otherwise places in the piece.
    """
    if not packing:
        return pieces.map(lambda piece: row_of(piece, T, fields))
    rows = grain.experimental.FirstFitPackIterDataset(
        pieces.map(lambda piece: with_fields(piece, fields)),
        length_struct={field.name: T for field in fields},
        num_packing_bins=BINS,
        shuffle_bins=False,
        padding_struct={field.name: field.padding for field in fields},
    )

    def with_places(row: dict) -> dict:
        places = {"segments": row["tokens_segment_ids"], "positions": row["tokens_positions"]}
        return places | {field.name: row[field.name] for field in fields}

    return rows.map(with_places)


def with_fields(piece: dict, fields: tuple[Field, ...]) -> dict:
    """A piece with every field of an objective, each [n] in its dtype."""
    return {
        field.name: np.asarray(
            field.derive(piece) if field.derive else piece[field.name], field.dtype
        )
        for field in fields
    }


def row_of(piece: dict, T: int, fields: tuple[Field, ...] = NEXT_TOKEN) -> dict:
    """A row of T tokens that holds one piece and padding."""
    n = len(piece["tokens"])
    index = np.arange(T, dtype=np.int32)
    row = {
        field.name: np.pad(values, (0, T - n), constant_values=field.padding)
        for field, values in zip(fields, with_fields(piece, fields).values(), strict=True)
    }
    places = {
        "segments": (index < n).astype(np.int32),
        "positions": np.where(index < n, index, 0).astype(np.int32),
    }
    return places | row
