"""Tokenized documents in memory-mapped files."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

SHARES = (0.5, 0.9, 0.99)  # quantiles of the lengths in the statistics


class TokenStore:
    """Tokenized documents: `tokens(i)` uint32 and `mask(i)` bool of document i, `lengths` int64.

    `stream` uint32 and `trained` bool are the tokens and masks of all documents, concatenated;
    document i is at [offsets[i], offsets[i + 1]).
    """

    def __init__(self, folder: Path):
        self.offsets = np.load(folder / "offsets.npy")
        self.stream = _map(folder / "tokens.bin", np.uint32)
        self.trained = _map(folder / "mask.bin", np.bool_)
        self.lengths = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> np.ndarray:
        return self.stream[self.offsets[i] : self.offsets[i + 1]]

    def mask(self, i: int) -> np.ndarray:
        return self.trained[self.offsets[i] : self.offsets[i + 1]]

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
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


class TokenWriter:
    """Writes the files of a TokenStore."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder, self.offsets = folder, [0]
        self.files = {name: open(folder / name, "wb") for name in ("tokens.bin", "mask.bin")}
        self.sums = dict.fromkeys(self.files, 0)

    def add(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        for (name, file), array in zip(self.files.items(), (tokens, mask), strict=True):
            file.write(content := array.tobytes())
            self.sums[name] = zlib.crc32(content, self.sums[name])
        self.offsets.append(self.offsets[-1] + len(tokens))

    def close(self) -> dict[str, int]:
        """The CRC-32 of each file."""
        for file in self.files.values():
            file.close()
        np.save(self.folder / "offsets.npy", np.asarray(self.offsets, np.int64))
        return self.sums | {"offsets.npy": crc32(self.folder / "offsets.npy")}


def crc32(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc
