"""The fields of a batch: name, dtype and padding value of each."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np

IGNORED = -100  # a target that is not predicted, as in transformers


class Batch(TypedDict):
    """Arrays [A, B, T] of a step (A accumulated passes), or [B, T] of one pass.

    An objective with more fields adds them in a subclass.

    tokens: int32 token ids, 0 for padding.
    targets: int32 id of the token to predict at each position, IGNORED for none.
    segments: int32 document of each token in a packed row, from 1; 0 for padding.
    positions: int32 position of each token in its document.
    index: int32 position of each token in its row; rows may be reordered over devices.
    """

    tokens: Any
    targets: Any
    segments: Any
    positions: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Field:
    """One value per token of a batch, read from the pieces of documents.

    padding: the value in positions that hold no token.
    derive: the arrays of a piece (tokens, targets and others of its kind), each [n] -> the field's
      values [n]; None for a field that the pieces hold already.
    """

    name: str
    dtype: type[np.generic] = np.int32
    padding: int | float = 0
    derive: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None


# The fields of every objective that predicts the next token.
NEXT_TOKEN = (Field("tokens"), Field("targets", padding=IGNORED))
# Added to every row by packing, unless they are among the fields, and to every batch by placement.
PLACES = ("segments", "positions", "index")


def dtypes(fields: tuple[Field, ...]) -> dict[str, type[np.generic]]:
    """The dtype of every array of a batch by its name."""
    return dict.fromkeys(PLACES, np.int32) | {field.name: field.dtype for field in fields}
