"""A folder of text files (a code repository, papers as text) into JSONL documents with file
markers.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from lljax.errors import ConfigError, printable

MARKER = "### file: {path}\n"  # what stands before each file in a document
MAX_FILE = 4 << 20  # bytes; a larger file is data, not text that somebody wrote


def text_files(
    folder: Path,
    include,
    exclude,
    *,
    out: Path | None = None,
    follow_links: bool = False,
    skipped: list[str] | None = None,
) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of the UTF-8 text files, in sorted order.

    include, exclude: shell patterns on the path or the file name; hidden files and folders are left
      out.
    out: the file that is being written, which is left out. follow_links: also what links lead to
      outside the folder.
    skipped: takes the names of files that match and are no text (or links that dangle, lead outside
      or to hidden files, or above MAX_FILE).
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
    """What a file holds; "" where its content or its name is not UTF-8, or it cannot be read."""
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
    folder: Path, include=("*",), exclude=(), *, repository: bool = False, **how
) -> Iterator[str]:
    """One document per file; or, with `repository`, one per folder of files, each file behind its
    marker. how: as for `text_files`.
    """
    together: dict[str, list[str]] = {}
    for name, text in text_files(folder, include, exclude, **how):
        marked = MARKER.format(path=printable(name)) + text.rstrip("\n") + "\n"
        if repository:
            together.setdefault(str(Path(name).parent), []).append(marked)
        else:
            yield marked
    yield from ("\n".join(parts) for parts in together.values())


def write_jsonl(texts, out: Path) -> tuple[int, int]:
    """Writes {"text": ...} rows; returns how many and how many characters.

    `out` appears, or is replaced, when complete, and not where there are no rows.

    Raises:
      ConfigError: nothing can be written there.
    """
    unfinished, rows, characters = out.with_name(f".{out.name}.tmp"), 0, 0
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
            f"--out={printable(str(out))}: it cannot be written ({error.strerror.lower()})"
        ) from None
    with file:
        file.truncate(0)  # what a process that was killed has left
        try:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                rows, characters = rows + 1, characters + len(text)
            file.flush()
            if rows:
                unfinished.rename(out)
        finally:
            unfinished.unlink(missing_ok=True)
    return rows, characters
