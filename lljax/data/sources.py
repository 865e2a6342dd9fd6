"""Finds files of rows and reads them row by row, whatever their size."""

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lljax.errors import DataError, counted, first_line, printable

LINES = (".jsonl", ".jsonl.gz")  # one row a line
ARRAYS = (".json", ".json.gz")  # one array of rows, or one row a line
MAX_ROW_BYTES = 16 << 20  # the default of data.max_row_bytes
CHUNK = 1 << 20  # bytes read at a time
DATASETS = (
    "the datasets library converts it: load_dataset({!r}, data_files=FILE)['train'].to_json(OUT)"
)
FOREIGN = {  # advice to convert other files to JSONL, by suffix
    ".parquet": DATASETS.format("parquet"),
    ".arrow": DATASETS.format("arrow"),
    ".csv": DATASETS.format("csv"),
    ".zip": "unzip it",
    ".zst": "unzstd it",
    ".xz": "unxz it",
    ".bz2": "bunzip2 it",
}
TEXTS = "`lljax data folder` makes one of a folder of texts"


# ---------------------------------------------------------------- files
def files(paths: Iterable[str | Path], *, field: str = "") -> list[Path]:
    """The files of rows of `paths`, which are files or folders of JSONL; folders in sorted order.

    A folder's .json files are not read: they are often settings. field: the name of the setting
    that holds the paths, for errors.

    Raises:
      DataError: a path is missing or not a file of rows, or a folder holds none.
    """
    result, prefix = [], f"{field}: " if field else ""
    for path in (Path(os.path.expanduser(path)) for path in paths):
        shown = prefix + printable(str(path))
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
            inside = _inside(path) if is_folder else []
        except OSError as error:  # the name is too long
            reason = os.strerror(error.errno or 0).lower()
            raise DataError(f"{shown[:120]}: {reason}") from None
        if is_folder:
            if not inside:
                raise DataError(
                    f"{shown}: the folder holds no {' or '.join(LINES)} file; a .json "
                    "file is read if it is named itself"
                )
            result += inside
        elif not is_file:
            raise DataError(
                f"{shown}: there is no such file; {TEXTS}, and "
                "`lljax data stdlib` one of Python's library"
            )
        elif not path.name.endswith(LINES + ARRAYS):
            advice = FOREIGN.get(path.suffix, TEXTS)
            raise DataError(f"{shown}: not a {', '.join(LINES + ARRAYS)} file; {advice}")
        else:
            result.append(path)
    return result


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.name.endswith(LINES) and p.is_file())


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise DataError(f"{printable(str(file))}: it cannot be read ({reason})") from None


# ---------------------------------------------------------------- rows
def rows(
    file: Path, *, max_row_bytes: int = MAX_ROW_BYTES, expected: str | None = None
) -> Iterator[tuple[int, object]]:
    """(number, row) of one file, without loading it whole.

    A row is the bytes of a line, numbered by line, or a decoded item of a JSON array, numbered by
    item, or a ValueError with the reason why it is unreadable.
    expected: the SHA-256 that the file must have.

    Raises:
      DataError: the file cannot be read to its end, or has another SHA-256; an array is not JSON; a
        .gz file is damaged (its checksum is at the end: damaged rows may have been yielded by
        then).
    """
    shown, number = printable(str(file)), 0
    try:
        with _Hashed(file) as raw, io.BufferedReader(raw, CHUNK) as whole:
            opened = gzip.open(whole) if file.suffix == ".gz" else whole
            begins = opened.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            as_array = file.name.endswith(ARRAYS) and begins == b"["
            for number, row in (_array if as_array else _lines)(opened, max_row_bytes):
                yield number, row
            while whole.read(CHUNK):  # bytes after the end of a .gz
                pass
    except EOFError:
        raise DataError(
            f"{shown}: the file is cut off after row {number}; fetch or write it again"
        ) from None
    except _NotAnArray as error:
        raise DataError(f"{shown}: {error}") from None
    except (zlib.error, OSError) as error:
        raise DataError(
            f"{shown}: the file is damaged, or cannot be read after row {number} "
            f"({first_line(error)}); fetch or write it again"
        ) from None
    if expected not in (None, raw.digest.hexdigest()):
        raise DataError(
            f"{shown}: the file changed while it was read, and nothing of it is kept: "
            "give the same command again when it is complete"
        )


class _Hashed(io.RawIOBase):
    """The bytes of a file; `digest` is the SHA-256 of the bytes read so far."""

    def __init__(self, file: Path):
        self._file, self.digest = open(file, "rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _TooLong(ValueError):
    """A row is longer than data.max_row_bytes."""

    def __init__(self, limit: int):
        super().__init__(f"the row is longer than data.max_row_bytes={limit}")


def _lines(opened: Any, limit: int) -> Iterator[tuple[int, bytes | ValueError]]:
    number = 0
    while line := opened.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            yield number, _TooLong(limit)
            while (rest := opened.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
        elif line.strip():
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


# ---------------------------------------------------------------- arrays
class _NotAnArray(ValueError):
    """A file is not a JSON array of rows; the message says where it ends."""


def _array(opened: Any, limit: int) -> Iterator[tuple[int, object]]:
    text, number, decode = _Text(opened), 0, json.JSONDecoder().raw_decode
    try:
        text.take("[")
        while text.next() != "]":
            try:
                row, end = decode(text.read, text.at)
            except RecursionError:
                raise _NotAnArray(f"row {number + 1} is nested too deeply") from None
            except ValueError as error:  # damaged, or the rest of the row was not read yet
                if len(text.read) - text.at > limit:
                    raise _NotAnArray(
                        f"row {number + 1} is longer than data.max_row_bytes={limit}, or not JSON"
                    ) from None
                if not text.more():
                    reason = getattr(error, "msg", error)
                    raise _NotAnArray(
                        f"row {number + 1} is not JSON ({reason}), or the file is cut off"
                    ) from None
                continue
            number, length, text.at = number + 1, end - text.at, end
            yield number, _TooLong(limit) if length > limit else row
            if not text.take(",") and text.next() != "]":
                raise _NotAnArray(f"the array does not go on after row {number}, or is cut off")
        text.take("]")
        if text.next():
            raise _NotAnArray(f"something follows the array of {counted(number, 'row')}")
    except UnicodeDecodeError:
        raise _NotAnArray(f"not UTF-8 after row {number}") from None


class _Text:
    """The text of a file, read as needed. `read` is the buffer, consumed up to `at`."""

    SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, opened: Any):
        self.read, self.at = "", 0
        self._opened, self._decoder = opened, codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Reads more; False at the end. Doubles the buffer, so that a long row is parsed rarely."""
        new = self._opened.read(max(CHUNK, len(self.read) - self.at))
        self.read, self.at = self.read[self.at :] + self._decoder.decode(new, final=not new), 0
        return bool(new)

    def next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = self.SPACE.match(self.read, self.at)
            assert space is not None, "the pattern also matches nothing"
            self.at = space.end()
            if self.at < len(self.read) or not self.more():
                return self.read[self.at : self.at + 1]

    def take(self, sign: str) -> bool:
        """Consumes `sign` if it is next; says whether it was."""
        is_next = self.next() == sign
        self.at += is_next
        return is_next
