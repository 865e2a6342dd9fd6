"""Log-probabilities of the reference, computed once before the first step and kept with the run:
`objective.reference = "precomputed"`.
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from lljax.data.batch import Field
from lljax.data.files import atomic_write
from lljax.data.kinds import RowKind, Source
from lljax.data.packing import row_of
from lljax.objectives.objective import REFERENCE, Objective

FIELD = Field(REFERENCE, np.float32)
Score = Callable[[dict[str, np.ndarray]], np.ndarray]  # batch [rows, T] -> float32 [rows, T]
Progress = Callable[[Iterator, str], Iterator]


@dataclasses.dataclass(frozen=True)
class ReferencePieces:
    """Pieces with the field REFERENCE; see lljax.data.kinds.Source.

    values: of all pieces, one after the other; piece i is at [offsets[i], offsets[i + 1]).
    """

    pieces: Source
    values: Float32[np.ndarray, " n"]
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.pieces[i] | {REFERENCE: self.values[self.offsets[i] : self.offsets[i + 1]]}

    def counts(self) -> dict[str, int]:
        return self.pieces.counts()

    def __repr__(self) -> str:
        return repr(self.pieces)


def with_reference(kind: RowKind, values: Float32[np.ndarray, " n"]) -> RowKind:
    """The kind of rows whose pieces have the field REFERENCE. values: see `precomputed`."""

    def pieces(*arguments: Any) -> ReferencePieces:
        plain = kind.pieces(*arguments)
        lengths = [len(plain[i]["tokens"]) for i in range(len(plain))]
        return ReferencePieces(plain, values, np.cumsum([0, *lengths]))

    return dataclasses.replace(kind, pieces=pieces)


def precomputed(
    path: Path,
    pieces: Source,
    objective: Objective,
    *,
    rows: int,
    T: int,
    identity: str,
    score: Score,
    progress: Progress,
) -> Float32[np.ndarray, " n"]:
    """The log-probabilities of the targets of all pieces under the reference, one piece after the
    other: from `path`, or computed and kept there.

    rows: of a batch of `score`. identity: of everything that the values depend on; a file of
      another one is not read. progress(iterator, title) may wrap the iteration over batches.
    """
    total = sum(len(pieces[i]["tokens"]) for i in range(len(pieces)))
    if (known := _read(path, total, identity)) is not None:
        return known
    values: list[np.ndarray] = []
    starts = iter(range(0, len(pieces), rows))
    for start in progress(starts, "log-probabilities of the reference"):
        batch = [pieces[i] for i in range(start, min(start + rows, len(pieces)))]
        lengths = [len(piece["tokens"]) for piece in batch]
        batch += [{name: x[:0] for name, x in batch[0].items()}] * (rows - len(batch))
        filled = [row_of(piece, T, objective.fields) for piece in batch]
        scores = score({name: np.stack([row[name] for row in filled]) for name in filled[0]})
        values += [row[:n] for row, n in zip(scores, lengths, strict=False)]
    result = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)
    content = io.BytesIO()
    crc = zlib.crc32(result.tobytes())
    np.savez(content, values=result, crc32=crc, identity=np.asarray(identity))
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, content.getvalue())
    return result


def _read(path: Path, total: int, identity: str) -> np.ndarray | None:
    """The values in a file of `precomputed`; None if it is not there, not as it was written, or of
    another identity.
    """
    try:
        with np.load(path) as content:
            values, crc = content["values"], int(content["crc32"])
            same = str(content["identity"]) == identity
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    sound = same and len(values) == total and zlib.crc32(values.tobytes()) == crc
    return values if sound else None
