"""Tokenized documents in memory-mapped files."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHARES = (0.5, 0.9, 0.99)  # quantiles of the lengths in the statistics


class Encoded(NamedTuple):
    """A tokenized row.

    tokens: uint32 [n]. mask: of the trained tokens, bool [n]. branches: uint8 [n], for rows of
    several answers (lljax.data.groups). row: what is kept of the row beside its tokens, for JSON.
    """

    tokens: np.ndarray
    mask: np.ndarray
    branches: np.ndarray | None = None
    row: dict | None = None


class TokenStore:
    """Tokenized documents: `tokens(i)` uint32 and `mask(i)` bool of document i, `lengths` int64.

    `stream` uint32 and `trained` bool are the tokens and masks of all documents, concatenated;
    document i is at [offsets[i], offsets[i + 1]). `branching` uint8 are the branches, of rows that
    have them, otherwise empty.
    """

    def __init__(self, folder: Path):
        self.offsets = np.load(folder / "offsets.npy")
        self.stream = _map(folder / "tokens.bin", np.uint32)
        self.trained = _map(folder / "mask.bin", np.bool_)
        self.branching = _map(folder / "branches.bin", np.uint8)
        self.lengths = np.diff(self.offsets)
        self._rows = _map(folder / "rows.jsonl", np.uint8)
        places = folder / "rows.npy"
        self._row_offsets = np.load(places) if places.exists() else np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> np.ndarray:
        return self.stream[self.offsets[i] : self.offsets[i + 1]]

    def mask(self, i: int) -> np.ndarray:
        return self.trained[self.offsets[i] : self.offsets[i + 1]]

    def branches(self, i: int) -> np.ndarray:
        """The branch of each token of group i, uint8 [n]."""
        return self.branching[self.offsets[i] : self.offsets[i + 1]]

    def row(self, i: int) -> dict:
        """What was kept of row i beside its tokens."""
        return json.loads(self._rows[self._row_offsets[i] : self._row_offsets[i + 1]].tobytes())

    def statistics(self) -> dict:
        """Counts, length quantiles and a histogram over powers of two, for the report."""
        edges = (
            2 ** np.arange(0, 2 + int(np.ceil(np.log2(self.lengths.max()))))
            if len(self)
            else np.array([1, 2])
        )
        counts = np.histogram(self.lengths, edges)[0]
        first = int(np.argmax(counts > 0))
        lengths = (
            {f"p{round(100 * q)}": int(np.quantile(self.lengths, q)) for q in SHARES}
            if len(self)
            else {}
        )
        return {
            "documents": len(self),
            "tokens": int(self.lengths.sum()),
            "trained_tokens": int(self.trained.sum()),
            "lengths": lengths | ({"max": int(self.lengths.max())} if len(self) else {}),
            "histogram": {"edges": edges[first:].tolist(), "counts": counts[first:].tolist()},
        }


def _map(path: Path, dtype: Any) -> np.ndarray:
    filled = path.exists() and path.stat().st_size
    return np.memmap(path, dtype, "r") if filled else np.zeros(0, dtype)


class TokenWriter:
    """Writes the files of a TokenStore.

    extra: the values of `Encoded` that the rows have beside tokens and mask.
    """

    FILES = {"branches": "branches.bin", "row": "rows.jsonl"}

    def __init__(self, folder: Path, extra: Sequence[str] = ()):
        folder.mkdir(parents=True)
        self.folder, self.offsets, self.row_offsets = folder, [0], [0]
        names = ("tokens.bin", "mask.bin", *(self.FILES[name] for name in extra))
        self.files = {name: open(folder / name, "wb") for name in names}
        self.sums = dict.fromkeys(names, 0)

    def add(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        branches: np.ndarray | None = None,
        row: dict | None = None,
    ) -> None:
        """Appends a row: the values of `Encoded`."""
        self._write("tokens.bin", tokens.tobytes())
        self._write("mask.bin", mask.tobytes())
        if branches is not None:
            self._write("branches.bin", branches.tobytes())
        if row is not None:
            self._write("rows.jsonl", line := json.dumps(row).encode() + b"\n")
            self.row_offsets.append(self.row_offsets[-1] + len(line))
        self.offsets.append(self.offsets[-1] + len(tokens))

    def _write(self, name: str, content: bytes) -> None:
        self.files[name].write(content)
        self.sums[name] = zlib.crc32(content, self.sums[name])

    def close(self) -> dict[str, int]:
        """The CRC-32 of each file."""
        for file in self.files.values():
            file.close()
        places = {"offsets.npy": self.offsets}
        if "rows.jsonl" in self.files:
            places["rows.npy"] = self.row_offsets
        for name, offsets in places.items():
            np.save(self.folder / name, np.asarray(offsets, np.int64))
            self.sums[name] = crc32(self.folder / name)
        return self.sums


def crc32(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc
