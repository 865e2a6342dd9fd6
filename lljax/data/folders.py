"""A folder of text files (a code repository, papers as text) into JSONL documents with file markers."""

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

MARKER = "### file: {path}\n"                # what stands before each file in a document
MAX_FILE = 4 << 20                           # bytes; a larger file is data, not text that somebody wrote


def text_files(folder: Path, include, exclude, *, out: Path | None = None,
               skipped: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of the UTF-8 text files, in sorted order.

    include, exclude: shell patterns on the path or the file name; hidden files and folders are left out.
    out: the file that is being written, which is left out. skipped: takes the names of files that match and are no text
    (or dangling links, or above MAX_FILE).
    """
    skipped = [] if skipped is None else skipped
    own = set() if out is None else {out.resolve(), _unfinished(out).resolve()}
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        wanted = any(fnmatch(name, p) or fnmatch(path.name, p) for p in include)
        if not wanted or any(fnmatch(name, p) or fnmatch(path.name, p) for p in exclude):
            continue
        if path.resolve() in own:
            continue
        text = _text(path)
        if text.strip() and "\0" not in text:
            yield name, text
        else:
            skipped.append(name)


def _text(path: Path) -> str:
    """What a file holds; "" where its content or its name is not UTF-8, or it cannot be read."""
    try:
        str(path).encode("utf-8")
        return path.read_bytes().decode("utf-8") if path.is_file() and path.stat().st_size <= MAX_FILE else ""
    except (UnicodeError, OSError):
        return ""


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def documents(folder: Path, include=("*",), exclude=(), *, repository: bool = False, out: Path | None = None,
              skipped: list[str] | None = None) -> Iterator[str]:
    """One document per file; or, with `repository`, one per folder of files, each file behind its marker."""
    together: dict[str, list[str]] = {}
    for name, text in text_files(folder, include, exclude, out=out, skipped=skipped):
        marked = MARKER.format(path=name) + text.rstrip("\n") + "\n"
        if repository:
            together.setdefault(str(Path(name).parent), []).append(marked)
        else:
            yield marked
    yield from ("\n".join(parts) for parts in together.values())


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".tmp")


def write_jsonl(texts, out: Path) -> tuple[int, int]:
    """Writes {"text": ...} rows; returns how many and how many characters.

    `out` appears, or is replaced, when complete, and not where there are no rows.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished, rows, characters = _unfinished(out), 0, 0
    with open(unfinished, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            rows, characters = rows + 1, characters + len(text)
    if rows:
        unfinished.rename(out)
    else:
        unfinished.unlink()
    return rows, characters
