"""Every document tokenised once, into memory-mapped files that later runs of the same command find again."""

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lljax.data import formats
from lljax.data.formats import BadRow, Document
from lljax.data.template import PLAIN_TEMPLATE, encode, with_template
from lljax.errors import DataError, ModelError

ENCODING = 2                                 # raised when the same documents give other tokens or masks
SHARES = (0.5, 0.9, 0.99)


class TokenStore:
    """Tokenised documents: `tokens(i)` uint32 and `mask(i)` bool of document i, `lengths` int64 of all; `stream` uint32, the
    tokens of all, end to end.

    Raises:
      DataError: the files are not as long as they were written.
    """

    def __init__(self, folder: Path):
        self._offsets = np.load(folder / "offsets.npy")
        self.stream = _map(folder / "tokens.bin", np.uint32)
        self._mask = _map(folder / "mask.bin", np.bool_)
        if not len(self.stream) == len(self._mask) == self._offsets[-1]:
            raise DataError(f"{folder}: the documents kept there are cut short: delete the folder, and they are read again")
        self.lengths = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> np.ndarray:
        return self.stream[self._offsets[i]:self._offsets[i + 1]]

    def mask(self, i: int) -> np.ndarray:
        return self._mask[self._offsets[i]:self._offsets[i + 1]]

    def statistics(self) -> dict:
        """Counts, length quantiles and a histogram over powers of two, for the report."""
        edges = 2 ** np.arange(0, 2 + int(np.ceil(np.log2(self.lengths.max())))) if len(self) else np.array([1, 2])
        counts = np.histogram(self.lengths, edges)[0]
        first = int(np.argmax(counts > 0))
        lengths = {f"p{round(100 * q)}": int(np.quantile(self.lengths, q)) for q in SHARES} if len(self) else {}
        return {"documents": len(self), "tokens": int(self.lengths.sum()), "trained_tokens": int(self._mask.sum()),
                "lengths": lengths | ({"max": int(self.lengths.max())} if len(self) else {}),
                "histogram": {"edges": edges[first:].tolist(), "counts": counts[first:].tolist()}}


def _map(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class Documents:
    """The outcome of `prepare`. fingerprint: of the content of the files and of how it was tokenised. bad: rows that
    could not be used."""

    train: TokenStore
    valid: TokenStore
    fingerprint: str
    bad: int


def prepare(data, tokenizer, vocabulary: int, cache: Path, *, tokenizer_fingerprint: str,
            progress: Callable[[Iterator, str], Iterator] = lambda items, text: items) -> Documents:
    """Reads and tokenises what `config.data` names, or finds it done in `cache`.

    Rows that cannot be used are listed in `cache`/../bad_rows.jsonl by file, line and reason, never with their text.
    `progress(iterator, title)` may wrap the iteration over rows.

    Raises:
      DataError: no usable row, too many bad ones (data.max_bad_fraction), a file that is missing or cannot be read.
      ModelError: the tokenizer knows tokens that the model does not.
    """
    tokenizer = with_template(tokenizer)
    sources = {"train": list(data.train), "valid": list(data.valid)}
    how = [ENCODING, PLAIN_TEMPLATE, tokenizer.special_tokens_map, data.loss_on, data.valid_fraction,
           tokenizer_fingerprint]
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    for part, paths in sources.items():
        for file in formats.files(paths):
            try:
                with open(file, "rb") as opened:
                    digest.update(part.encode() + hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file}: it cannot be read ({error.strerror.lower()})") from None
    fingerprint = digest.hexdigest()
    folder = cache / fingerprint[:16]
    if not (folder / "counts.json").exists():
        _build(folder, sources, data, tokenizer, vocabulary, progress)
    counts = json.loads((folder / "counts.json").read_text())
    listed = cache.parent / "bad_rows.jsonl"
    listed.unlink(missing_ok=True)
    if counts["bad"]:
        shutil.copyfile(folder / "bad_rows.jsonl", listed)
    _check(counts, data)
    return Documents(TokenStore(folder / "train"), TokenStore(folder / "valid"), fingerprint, counts["bad"])


def _build(folder: Path, sources, data, tokenizer, vocabulary, progress) -> None:
    """Writes `folder`, which appears when complete; another process may be building the same one."""
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _fill(unfinished, sources, data, tokenizer, vocabulary, progress)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "counts.json").exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, sources, data, tokenizer, vocabulary, progress) -> None:
    writers = {part: _Writer(folder / part) for part in sources}
    rows, bad, first = 0, 0, ""
    for part, paths in sources.items():
        for row in progress(formats.read(paths), f"tokenising {part}"):
            rows += 1
            if isinstance(row, Document):
                try:
                    tokens, mask = encode(row, tokenizer, data.loss_on)
                except ValueError as error:
                    file, _, line = row.where.rpartition(":")
                    row = BadRow(file, int(line), str(error))
            if isinstance(row, BadRow):
                bad += 1
                first = first or f"{row.file}:{row.line}: {row.reason}"
                with open(folder / "bad_rows.jsonl", "a") as listed:
                    listed.write(json.dumps(dataclasses.asdict(row)) + "\n")
                continue
            if tokens.max() >= vocabulary:
                raise ModelError(f"the tokenizer gives token {tokens.max()} ({row.where}) but the model's "
                                 f"vocabulary has {vocabulary}: they do not belong together")
            held_out = part == "train" and share(row) < data.valid_fraction
            writers["valid" if held_out else part].add(tokens, mask)
    for writer in writers.values():
        writer.close()
    (folder / "counts.json").write_text(json.dumps({"rows": rows, "bad": bad, "first_bad": first}))


def _check(counts: dict, data) -> None:
    rows, bad = counts["rows"], counts["bad"]
    if bad > data.max_bad_fraction * rows:
        raise DataError(f"{bad} of {rows} rows cannot be used, more than "
                        f"data.max_bad_fraction={data.max_bad_fraction}; the first is {counts['first_bad']}; "
                        "all are listed in bad_rows.jsonl")
    if rows == bad:
        raise DataError(f"data.train={tuple(data.train)} holds no usable row")


def share(document: Document) -> float:
    """A number in [0, 1) that depends on the content alone, so that a document is held out wherever it stands."""
    return int.from_bytes(hashlib.sha256(document.content().encode("utf-8", "surrogatepass")).digest()[:8]) / 2 ** 64


class _Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder, self.offsets = folder, [0]
        self.tokens, self.mask = open(folder / "tokens.bin", "wb"), open(folder / "mask.bin", "wb")

    def add(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        self.tokens.write(tokens.tobytes())
        self.mask.write(mask.tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))

    def close(self) -> None:
        self.tokens.close()
        self.mask.close()
        np.save(self.folder / "offsets.npy", np.asarray(self.offsets, np.int64))
