"""Tokenizes every document once, into memory-mapped files that later runs reuse."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lljax.data import sources
from lljax.data.formats import BadRow, Document, read_file
from lljax.data.kinds import DOCUMENTS, Row, RowKind
from lljax.data.template import PLAIN_TEMPLATE, encode, with_template
from lljax.data.template_date import dated
from lljax.data.token_store import Encoded, TokenStore, TokenWriter, crc32
from lljax.errors import DataError, ModelError, first_line, printable

ENCODING = 3  # increased when the same documents give other tokens or masks
# Their tokens are part of the fingerprint: libraries that encode differently give another one.
TALK = tuple({"role": role, "content": f" {role}: a\n"} for role in 2 * ("user", "assistant"))
PROBES = (
    Document("", text="def f(x):\n    return 'é' # 12\n\n"),
    Document("", messages=TALK),
    Document("", prompt="1 + 1 = ", text=" 2"),
)
Progress = Callable[[Iterator, str], Iterator]
FIELDS = {"train": "data.train", "valid": "data.valid"}
Files = Mapping[str, Sequence[tuple[Path, str]]]  # by part, with the SHA-256
KEYS = 100  # unread keys counted by name in a file
LOCK = "lock"  # in an unfinished folder; its writer holds it
ABANDONED = 600  # seconds after which an unfinished folder without a lock has no writer


@dataclasses.dataclass(frozen=True)
class Documents:
    """The result of `prepare`.

    fingerprint: of the files' content and the tokenization. bad: the number of unusable rows.
    counts: for "train" and "valid", the numbers of rows, bad_rows and conversations, and unread:
    the number of rows by file and key that no parser reads.
    """

    train: TokenStore
    valid: TokenStore
    fingerprint: str
    bad: int
    counts: dict[str, dict]


def prepare(
    data: Any,
    tokenizer: Any,
    vocabulary: int,
    cache: Path,
    *,
    tokenizer_fingerprint: str,
    progress: Progress = lambda items, title: items,
    fields: Mapping[str, str] = FIELDS,
    kind: RowKind = DOCUMENTS,
) -> Documents:
    """Reads and tokenizes the files of `config.data`, or reuses their tokens in `cache`.

    Unusable rows are counted and listed in `cache`/../bad_rows.jsonl by file, line and reason,
    without their text. `progress(iterator, title)` may wrap the iteration over rows. fields: the
    names of the settings that hold the files, for errors. kind: of the rows in the files.

    Raises:
      DataError: no usable row, none held out, or too many unusable rows (data.max_bad_fraction);
        a file is missing, unreadable or changes while it is read; tokens in `cache` are damaged; a
        file is in the place of a folder; the kind of rows does not serve data.loss_on.
      ModelError: the tokenizer has tokens beyond the model's vocabulary.
    """
    kind.check_loss_on(data.loss_on)
    with _misplaced_files():
        tokenizer = dated(with_template(tokenizer), cache)
        files = {
            part: [
                (file, sources.sha256(file))
                for file in sources.files(paths, field=fields.get(part, ""))
            ]
            for part, paths in (("train", data.train), ("valid", data.valid))
        }
        fingerprint = _fingerprint(files, data, tokenizer, tokenizer_fingerprint, kind)
        folder = cache / fingerprint[:16]
        try:
            if not (folder / "counts.json").exists():
                _build(folder, _Source(files, data, tokenizer, vocabulary, progress, kind))
        finally:
            clear_unfinished(cache)
        counts = _checked(folder, vocabulary)
        bad_rows = cache.parent / "bad_rows.jsonl"
        bad_rows.unlink(missing_ok=True)
        if counts["bad"]:
            shutil.copyfile(folder / "bad_rows.jsonl", bad_rows)
    train, valid = TokenStore(folder / "train"), TokenStore(folder / "valid")
    documents = Documents(train, valid, fingerprint, counts["bad"], counts["parts"])
    _check_usable(documents, counts, data, fields)
    return documents


def _fingerprint(
    files: Files, data: Any, tokenizer: Any, tokenizer_fingerprint: str, kind: RowKind
) -> str:
    settings = [
        ENCODING,
        PLAIN_TEMPLATE,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        data.loss_on,
        data.valid_fraction,
        data.max_row_bytes,
        tokenizer_fingerprint,
        [_encoded_probe(probe, tokenizer) for probe in PROBES],
        *([] if kind.name == DOCUMENTS.name else [kind.name]),
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part, pairs in files.items():
        for _, sha256 in pairs:
            digest.update(part.encode() + bytes.fromhex(sha256))
    return digest.hexdigest()


def _encoded_probe(probe: Document, tokenizer: Any) -> list | str:
    try:
        return [part.tolist() for part in encode(probe, tokenizer, "assistant")]
    except ValueError as error:
        return str(error)


@contextlib.contextmanager
def _misplaced_files() -> Iterator[None]:
    """Raises DataError if a file is in the place of a folder, or the reverse, or not writable."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"{printable(str(error.filename))}: the tokens of the run cannot be kept there "
            f"({(error.strerror or '').lower()}): move it away, or use another --workdir"
        ) from None


# ---------------------------------------------------------------- the cache
def clear_unfinished(cache: Path) -> None:
    """Removes the unfinished folders of killed processes from `cache`."""
    for folder in cache.glob("*.tmp"):
        with contextlib.suppress(OSError):  # its writer lives, or another process removes it
            try:
                with open(folder / LOCK, "rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # not created yet, or just removed
                if time.time() - folder.stat().st_mtime < ABANDONED:
                    continue
            shutil.rmtree(folder)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The input of `prepare`: the files of each part with their SHA-256, and the settings."""

    files: Files
    data: Any
    tokenizer: Any
    vocabulary: int
    progress: Progress
    kind: RowKind

    def rows(self, part: str) -> Iterator[Row | BadRow]:
        rows = itertools.chain.from_iterable(
            read_file(
                file,
                max_row_bytes=self.data.max_row_bytes,
                expected=sha256,
                parse_row=self.kind.parse,
            )
            for file, sha256 in self.files[part]
        )
        return self.progress(rows, f"tokenizing {part}")


def _build(folder: Path, source: _Source) -> None:
    """Writes `folder`, which appears when complete; another process may build it too."""
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        with open(unfinished / LOCK, "wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            _fill(unfinished, source)
            (unfinished / LOCK).unlink()
            try:
                unfinished.rename(folder)
            except OSError:
                if not (folder / "counts.json").exists():
                    raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, source: _Source) -> None:
    """Writes the tokens and counts.json; lists unusable rows in bad_rows.jsonl."""
    data, tokenizer, vocabulary = source.data, source.tokenizer, source.vocabulary
    writers = {part: TokenWriter(folder / part, source.kind.extra) for part in source.files}
    parts: dict[str, dict[str, Any]] = {
        part: {"rows": 0, "bad_rows": 0, "conversations": 0, "unread": {}} for part in source.files
    }
    first, largest, template = "", 0, str(tokenizer.chat_template)
    for part, counts in parts.items():
        for row in source.rows(part):
            counts["rows"] += 1
            encoded = _encoded(row, source)
            if isinstance(encoded, BadRow):
                counts["bad_rows"] += 1
                first = first or str(encoded)
                with open(folder / "bad_rows.jsonl", "a") as bad_rows:
                    bad_rows.write(json.dumps(dataclasses.asdict(encoded)) + "\n")
                continue
            row, values = encoded
            if (largest := max(largest, int(values.tokens.max()))) >= vocabulary:
                raise _mismatch(largest, vocabulary, f" ({printable(row.where)})")
            held_out = part == "train" and share(row) < data.valid_fraction
            target = "valid" if held_out else part
            writers[target].add(*values)
            parts[target]["conversations"] += bool(row.messages)
            count_unread(row, counts["unread"], template)
    sums = {
        f"{part}/{name}": crc
        for part, writer in writers.items()
        for name, crc in writer.close().items()
    }
    if first:
        sums["bad_rows.jsonl"] = crc32(folder / "bad_rows.jsonl")
    totals = {
        "rows": sum(counts["rows"] for counts in parts.values()),
        "bad": sum(counts["bad_rows"] for counts in parts.values()),
        "first_bad": first,
        "largest": largest,
        "crc32": sums,
        "parts": parts,
    }
    (folder / "counts.json").write_text(json.dumps(totals | {"own_crc32": _own_crc32(totals)}))


def _encoded(row: Row | BadRow, source: _Source) -> tuple[Row, Encoded] | BadRow:
    """A row with its tokens, or the reason why it is unusable."""
    if isinstance(row, BadRow):
        return row
    try:
        return row, source.kind.encode(row, source.tokenizer, source.data.loss_on)
    except ValueError as error:
        file, _, line = row.where.rpartition(":")
        return BadRow(file, int(line), str(error))


def count_unread(row: Row, unread: dict[str, dict[str, int]], template: str | None) -> None:
    """Adds the row's unread keys to `unread`, the number of rows by file and key.

    template: the chat template, which sees whole messages and may read any key whose name it
    contains; None if unknown.
    """
    counts = unread.setdefault(row.where.rpartition(":")[0], {})
    for key in row.unread:
        of_message = key.startswith("messages.")
        if not of_message or template is not None and key.removeprefix("messages.") not in template:
            key = key if key in counts or len(counts) < KEYS else "(others)"
            counts[key] = counts.get(key, 0) + 1


def _checked(folder: Path, vocabulary: int) -> dict:
    """counts.json of a folder, after checking its files against their checksums."""

    def damaged(reason: str) -> DataError:
        return DataError(
            f"{printable(str(folder))}: the tokens kept there are damaged ({reason}): "
            "delete the folder, and they are made again"
        )

    try:
        counts = json.loads((folder / "counts.json").read_text())
        changed = ["counts.json"] if counts.pop("own_crc32", None) != _own_crc32(counts) else []
        for name, crc in counts["crc32"].items() if not changed else ():
            changed += [name] if crc32(folder / name) != crc else []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise damaged(first_line(error)) from None
    if changed:
        raise damaged(f"{changed[0]} is not as it was written")
    if counts["largest"] >= vocabulary:
        raise _mismatch(counts["largest"], vocabulary)
    return counts


def _own_crc32(counts: dict) -> int:
    return zlib.crc32(json.dumps(counts).encode())


def _mismatch(token: int, vocabulary: int, where: str = "") -> ModelError:
    return ModelError(
        f"the tokenizer gives token {token}{where} but the model's vocabulary has "
        f"{vocabulary}: they do not belong together"
    )


def _check_usable(documents: Documents, counts: dict, data: Any, fields: Mapping[str, str]) -> None:
    rows, bad = counts["rows"], counts["bad"]
    if bad > data.max_bad_fraction * rows:
        raise DataError(
            f"{bad} of {rows} rows cannot be used, more than "
            f"data.max_bad_fraction={data.max_bad_fraction}; the first is {counts['first_bad']}; "
            "all are listed in bad_rows.jsonl"
        )
    for part, paths in (("train", data.train), ("valid", data.valid)):
        if paths and documents.counts[part]["rows"] == documents.counts[part]["bad_rows"]:
            raise DataError(f"{fields.get(part, 'data')}={','.join(paths)} holds no usable row")
    if data.valid_fraction and not (len(documents.train) and len(documents.valid)):
        whole = "all" if len(documents.valid) else "none"
        raise DataError(
            f"data.valid_fraction={data.valid_fraction} holds {whole} of the "
            f"{rows - bad} documents out: set another share, or 0, or name held-out "
            "files in data.valid"
        )


def share(row: Row) -> float:
    """A number in [0, 1) from the content alone: a document is held out wherever it is."""
    digest = hashlib.sha256(row.content().encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64
