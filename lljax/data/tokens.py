"""Every document tokenized once, into memory-mapped files that later runs of the same command find
again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lljax.data import sources
from lljax.data.clock import dated
from lljax.data.formats import BadRow, Document, read_file
from lljax.data.template import PLAIN_TEMPLATE, encode, with_template
from lljax.errors import DataError, ModelError, first_line, printable

ENCODING = 3  # raised when the same documents give other tokens or masks
# What these become is part of the fingerprint: libraries that encode otherwise make other tokens.
TALK = tuple({"role": role, "content": f" {role}: a\n"} for role in 2 * ("user", "assistant"))
PROBES = (
    Document("", text="def f(x):\n    return 'é' # 12\n\n"),
    Document("", messages=TALK),
    Document("", prompt="1 + 1 = ", text=" 2"),
)
FIELDS = {"train": "data.train", "valid": "data.valid"}
SHARES = (0.5, 0.9, 0.99)
KEYS = 100  # unread keys of a file that are counted by name
LOCK = "lock"  # in a folder that is being written; its writer holds it
ABANDONED = 600  # seconds after which such a folder without a lock has no writer


class TokenStore:
    """Tokenized documents: `tokens(i)` uint32 and `mask(i)` bool of document i, `lengths` int64.

    End to end: `stream` uint32, the tokens of all, and `trained` bool, their masks; document i is
      at [offsets[i], offsets[i + 1]).
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


def _map(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class Documents:
    """The outcome of `prepare`.

    fingerprint: of the content of the files and of how it was tokenized. bad: rows that could not
    be used. counts: for "train" and "valid" the numbers of rows, bad_rows and conversations, and
    unread, the number of rows by file and key that no reader knows.
    """

    train: TokenStore
    valid: TokenStore
    fingerprint: str
    bad: int
    counts: dict[str, dict]


def prepare(
    data,
    tokenizer,
    vocabulary: int,
    cache: Path,
    *,
    tokenizer_fingerprint: str,
    progress: Callable[[Iterator, str], Iterator] = lambda items, text: items,
    fields: Mapping[str, str] = FIELDS,
) -> Documents:
    """Reads and tokenizes what `config.data` names, or finds it done in `cache`.

    Rows that cannot be used are listed in `cache`/../bad_rows.jsonl by file, line and reason, never
    with their text. `progress(iterator, title)` may wrap the iteration over rows. fields: what
    errors say named the files.

    Raises:
      DataError: no usable row, none held out, too many bad ones (data.max_bad_fraction); a file
        that is missing, cannot be read or changes while it is read; tokens in `cache` that are not
        as
        they were written; a file in the place of a folder.
      ModelError: the tokenizer knows tokens that the model does not.
    """
    with _in_their_places():
        tokenizer = dated(with_template(tokenizer), cache)
        files = {
            part: [
                (file, sources.sha256(file))
                for file in sources.files(paths, field=fields.get(part, ""))
            ]
            for part, paths in (("train", data.train), ("valid", data.valid))
        }
        fingerprint = _fingerprint(files, data, tokenizer, tokenizer_fingerprint)
        folder = cache / fingerprint[:16]
        try:
            if not (folder / "counts.json").exists():
                _build(folder, files, data, tokenizer, vocabulary, progress)
        finally:
            clear_unfinished(cache)
        counts = _checked(folder, vocabulary)
        listed = cache.parent / "bad_rows.jsonl"
        listed.unlink(missing_ok=True)
        if counts["bad"]:
            shutil.copyfile(folder / "bad_rows.jsonl", listed)
    train, valid = TokenStore(folder / "train"), TokenStore(folder / "valid")
    documents = Documents(train, valid, fingerprint, counts["bad"], counts["parts"])
    _usable(documents, counts, data, fields)
    return documents


def _fingerprint(files, data, tokenizer, tokenizer_fingerprint: str) -> str:
    how = [
        ENCODING,
        PLAIN_TEMPLATE,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        data.loss_on,
        data.valid_fraction,
        data.max_row_bytes,
        tokenizer_fingerprint,
        [_probed(probe, tokenizer) for probe in PROBES],
    ]
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    for part, pairs in files.items():
        for _, sha256 in pairs:
            digest.update(part.encode() + bytes.fromhex(sha256))
    return digest.hexdigest()


def _probed(probe: Document, tokenizer) -> list | str:
    try:
        return [part.tolist() for part in encode(probe, tokenizer, "assistant")]
    except ValueError as error:
        return str(error)


@contextlib.contextmanager
def _in_their_places():
    """One line where a file stands in the place of a folder, or the reverse, or is not writable."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"{printable(str(error.filename))}: the tokens of the run cannot be kept there "
            f"({error.strerror.lower()}): move it away, or use another --workdir"
        ) from None


# ---------------------------------------------------------------- the cache
def clear_unfinished(cache: Path) -> None:
    """Removes what processes that were killed have left in `cache`; what is being written stays."""
    for folder in cache.glob("*.tmp"):
        with contextlib.suppress(OSError):  # it is held, or another process removes it
            try:
                with open(folder / LOCK, "rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # not made yet, or just taken away
                if time.time() - folder.stat().st_mtime < ABANDONED:
                    continue
            shutil.rmtree(folder)


def _build(folder: Path, files, data, tokenizer, vocabulary, progress) -> None:
    """Writes `folder`, which appears when complete; another process may be building the same
    one.
    """
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        with open(unfinished / LOCK, "wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            _fill(unfinished, files, data, tokenizer, vocabulary, progress)
            (unfinished / LOCK).unlink()
            try:
                unfinished.rename(folder)
            except OSError:
                if not (folder / "counts.json").exists():
                    raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, files, data, tokenizer, vocabulary, progress) -> None:
    writers = {part: _Writer(folder / part) for part in files}
    parts = {part: {"rows": 0, "bad_rows": 0, "conversations": 0, "unread": {}} for part in files}
    first, largest, template = "", 0, str(tokenizer.chat_template)
    for part, pairs in files.items():
        counts = parts[part]
        rows = itertools.chain.from_iterable(
            read_file(file, max_row_bytes=data.max_row_bytes, expected=sha256)
            for file, sha256 in pairs
        )
        for row in progress(rows, f"tokenizing {part}"):
            counts["rows"] += 1
            if isinstance(row, Document):
                try:
                    tokens, mask = encode(row, tokenizer, data.loss_on)
                except ValueError as error:
                    file, _, line = row.where.rpartition(":")
                    row = BadRow(file, int(line), str(error))
            if isinstance(row, BadRow):
                counts["bad_rows"] += 1
                first = first or str(row)
                with open(folder / "bad_rows.jsonl", "a") as listed:
                    listed.write(json.dumps(dataclasses.asdict(row)) + "\n")
                continue
            if (largest := max(largest, int(tokens.max()))) >= vocabulary:
                raise _foreign(largest, vocabulary, f" ({printable(row.where)})")
            into = "valid" if part == "train" and share(row) < data.valid_fraction else part
            writers[into].add(tokens, mask)
            parts[into]["conversations"] += bool(row.messages)
            count_unread(row, counts["unread"], template)
    sums = {
        f"{part}/{name}": crc
        for part, writer in writers.items()
        for name, crc in writer.close().items()
    }
    if first:
        sums["bad_rows.jsonl"] = _crc32(folder / "bad_rows.jsonl")
    counts = {
        "rows": sum(counts["rows"] for counts in parts.values()),
        "bad": sum(counts["bad_rows"] for counts in parts.values()),
        "first_bad": first,
        "largest": largest,
        "crc32": sums,
        "parts": parts,
    }
    (folder / "counts.json").write_text(json.dumps(counts | {"own_crc32": _own_crc32(counts)}))


def count_unread(
    document: Document, unread: dict[str, dict[str, int]], template: str | None
) -> None:
    """Adds the keys of a document that no reader knows to `unread`, rows by file and key.

    template: the chat template, which sees whole messages and may read any key whose name is in it;
    None: it is not known.
    """
    found = unread.setdefault(document.where.rpartition(":")[0], {})
    for key in document.unread:
        of_message = key.startswith("messages.")
        if not of_message or template is not None and key.removeprefix("messages.") not in template:
            key = key if key in found or len(found) < KEYS else "(others)"
            found[key] = found.get(key, 0) + 1


def _checked(folder: Path, vocabulary: int) -> dict:
    """counts.json of a folder whose tokens are as they were written."""

    def damaged(what: str) -> DataError:
        return DataError(
            f"{printable(str(folder))}: the tokens kept there are damaged ({what}): "
            "delete the folder, and they are made again"
        )

    try:
        counts = json.loads((folder / "counts.json").read_text())
        wrong = (
            "counts.json"
            if counts.pop("own_crc32", None) != _own_crc32(counts)
            else next(
                (name for name, crc in counts["crc32"].items() if _crc32(folder / name) != crc),
                None,
            )
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise damaged(first_line(error)) from None
    if wrong:
        raise damaged(f"{wrong} is not as it was written")
    if counts["largest"] >= vocabulary:
        raise _foreign(counts["largest"], vocabulary)
    return counts


def _own_crc32(counts: dict) -> int:
    return zlib.crc32(json.dumps(counts).encode())


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _foreign(token: int, vocabulary: int, where: str = "") -> ModelError:
    return ModelError(
        f"the tokenizer gives token {token}{where} but the model's vocabulary has "
        f"{vocabulary}: they do not belong together"
    )


def _usable(documents: Documents, counts: dict, data, fields) -> None:
    rows, bad = counts["rows"], counts["bad"]
    if bad > data.max_bad_fraction * rows:
        raise DataError(
            f"{bad} of {rows} rows cannot be used, more than "
            f"data.max_bad_fraction={data.max_bad_fraction}; the first is {counts['first_bad']}; "
            "all are listed in bad_rows.jsonl"
        )
    for part, paths in (("train", data.train), ("valid", data.valid)):
        if paths and documents.counts[part]["rows"] == documents.counts[part]["bad_rows"]:
            raise DataError(f"{fields.get(part, 'data')}={tuple(paths)} holds no usable row")
    if data.valid_fraction and not (len(documents.train) and len(documents.valid)):
        whole = "all" if len(documents.valid) else "none"
        raise DataError(
            f"data.valid_fraction={data.valid_fraction} holds {whole} of the "
            f"{rows - bad} documents out: set another share, or 0, or name held-out "
            "files in data.valid"
        )


def share(document: Document) -> float:
    """A number in [0, 1) that depends on the content alone, so that a document is held out wherever
    it stands.
    """
    return (
        int.from_bytes(
            hashlib.sha256(document.content().encode("utf-8", "surrogatepass")).digest()[:8]
        )
        / 2**64
    )


class _Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder, self.offsets = folder, [0]
        self.files = {name: open(folder / name, "wb") for name in ("tokens.bin", "mask.bin")}
        self.sums = dict.fromkeys(self.files, 0)

    def add(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        for (name, file), array in zip(self.files.items(), (tokens, mask)):
            file.write(content := array.tobytes())
            self.sums[name] = zlib.crc32(content, self.sums[name])
        self.offsets.append(self.offsets[-1] + len(tokens))

    def close(self) -> dict[str, int]:
        """The CRC-32 of each file."""
        for file in self.files.values():
            file.close()
        np.save(self.folder / "offsets.npy", np.asarray(self.offsets, np.int64))
        return self.sums | {"offsets.npy": _crc32(self.folder / "offsets.npy")}
