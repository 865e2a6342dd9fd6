"""A folder of text files (a code repository, papers as text) into JSONL documents with file markers."""

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

MARKER = "### file: {path}\n"                # what stands before each file in a document
MAX_FILE = 4 << 20                           # bytes; a larger file is data, not text that somebody wrote


def text_files(folder: Path, include, exclude) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of the UTF-8 text files, in sorted order.

    include, exclude: shell patterns on the path or the file name; hidden files and folders are left out.
    """
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        wanted = any(fnmatch(name, p) or fnmatch(path.name, p) for p in include)
        if not wanted or any(fnmatch(name, p) or fnmatch(path.name, p) for p in exclude):
            continue
        if path.stat().st_size > MAX_FILE:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            yield name, text


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def documents(folder: Path, include=("*",), exclude=(), *, repository: bool = False) -> Iterator[str]:
    """One document per file; or, with `repository`, one per folder of files, each file behind its marker."""
    together: dict[str, list[str]] = {}
    for name, text in text_files(folder, include, exclude):
        marked = MARKER.format(path=name) + text.rstrip("\n") + "\n"
        if repository:
            together.setdefault(str(Path(name).parent), []).append(marked)
        else:
            yield marked
    yield from ("\n".join(parts) for parts in together.values())


def write_jsonl(texts, out: Path) -> tuple[int, int]:
    """Writes {"text": ...} rows; returns how many and how many characters. Appears under its name when complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished, rows, characters = out.with_name(out.name + ".tmp"), 0, 0
    with open(unfinished, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            rows, characters = rows + 1, characters + len(text)
    unfinished.rename(out)
    return rows, characters
