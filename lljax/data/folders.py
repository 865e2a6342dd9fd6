"""Converts a folder of text files (a code repository, papers) to JSONL documents."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lljax.errors import ConfigError, printable

MARKER = "### file: {path}\n"  # precedes each file in a document
MAX_FILE = 4 << 20  # bytes; larger files are data rather than written text


def text_files(
    folder: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    out: Path | None = None,
    follow_links: bool = False,
    skipped: list[str] | None = None,
) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of the UTF-8 text files, in sorted order.

    include, exclude: shell patterns for the path or the file name; hidden files and folders are
      always left out.
    out: the output file, which is left out. follow_links: also follow links out of the folder.
    skipped: receives the names of matching files that are not text or exceed MAX_FILE, and of links
      that are broken, or lead outside or to hidden files.
    """
    skipped, root = [] if skipped is None else skipped, os.path.realpath(folder)
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        wanted = any(fnmatch(name, p) or fnmatch(path.name, p) for p in include)
        if not wanted or any(fnmatch(name, p) or fnmatch(path.name, p) for p in exclude):
            continue
        target = os.path.realpath(path)
        if out is not None and target == os.path.realpath(out):
            continue
        text = _text(path) if follow_links or _is_inside(target, root) else ""
        if text.strip() and "\0" not in text:
            yield name, text
        else:
            skipped.append(name)


def _is_inside(target: str, root: str) -> bool:
    """Whether `target` is in the folder `root` and not hidden there."""
    parts = os.path.relpath(target, root).split(os.sep)
    return not any(part.startswith(".") for part in parts)  # ".." leads out


def _text(path: Path) -> str:
    """The text of a file; "" if its content or name is not UTF-8, or it cannot be read."""
    try:
        str(path).encode("utf-8")
        return (
            path.read_bytes().decode("utf-8")
            if path.is_file() and path.stat().st_size <= MAX_FILE
            else ""
        )
    except (UnicodeError, OSError):
        return ""


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def documents(
    folder: Path,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    repository: bool = False,
    **filters: Any,
) -> Iterator[str]:
    """One document for each file, or with `repository` one for each folder of files; a MARKER
    precedes every file. filters: the keyword arguments of `text_files`.
    """
    together: dict[str, list[str]] = {}
    for name, text in text_files(folder, include, exclude, **filters):
        marked = MARKER.format(path=printable(name)) + text.rstrip("\n") + "\n"
        if repository:
            together.setdefault(str(Path(name).parent), []).append(marked)
        else:
            yield marked
    yield from ("\n".join(parts) for parts in together.values())


def write_jsonl(texts: Iterable[str], out: Path) -> tuple[int, int]:
    """Writes {"text": ...} rows, as `write_rows`; returns the numbers of rows and of characters."""
    characters = 0

    def rows() -> Iterator[dict]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield {"text": text}

    return write_rows(rows(), out), characters


def write_rows(rows: Iterable[dict], out: Path) -> int:
    """Writes rows to a JSONL file; returns their number.

    `out` appears, or is replaced, when it is complete; without rows it is not written.

    Raises:
      ConfigError: `out` cannot be written.
    """
    unfinished, count = out.with_name(f".{out.name}.tmp"), 0
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(unfinished, "a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--out={printable(str(out))}: another process is writing it") from None
    except OSError as error:
        raise ConfigError(
            f"--out={printable(str(out))}: it cannot be written "
            f"({(error.strerror or str(error)).lower()})"
        ) from None
    with file:
        file.truncate(0)  # a killed process may have left rows
        try:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            if count:
                unfinished.rename(out)
        finally:
            unfinished.unlink(missing_ok=True)
    return count
