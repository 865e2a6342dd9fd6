"""JSONL rows in, documents out. A row that cannot be read becomes a `BadRow` with its place, never an exception."""

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from lljax.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,19}")       # of a field or role; what else stands there may be a text
MAX_ROW = 1 << 30                            # bytes; a longer line is taken for damage


@dataclasses.dataclass(frozen=True)
class Document:
    """One training document: a conversation (`messages`), a continuation (`prompt`, `text`) or plain `text`."""

    where: str                               # "file:line"
    messages: tuple[dict, ...] = ()
    prompt: str = ""
    text: str = ""
    given: int = 0                           # how many of the messages are the prompt, not to be trained
    tools: tuple[dict, ...] = ()             # as chat templates take them
    untrained: frozenset[int] = frozenset()  # indices of messages whose loss is off

    def texts(self) -> list[str]:
        return [self.prompt, self.text, *(message.get("content") or "" for message in self.messages)]

    def content(self) -> str:
        """Its content in one canonical form: what tells documents apart."""
        return json.dumps([self.messages, self.prompt, self.text], sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class BadRow:
    file: str
    line: int
    reason: str                              # which goes to logs, and therefore holds no text of the row


def read(paths) -> Iterator[Document | BadRow]:
    """Every row of JSONL files (also .gz) and of folders of them, in sorted order, without loading a file whole.

    Raises:
      DataError: a path is missing, a folder holds no JSONL, a file cannot be read to its end, or a .gz file is damaged: its
        checksum shows that at its end, when rows that are not as they were have been taken for sound.
    """
    for file in files(paths):
        for number, line in _lines(file):
            if isinstance(line, BadRow):
                yield line
            elif line.strip():
                try:
                    yield parse(line, f"{file}:{number}")
                except ValueError as error:
                    yield BadRow(str(file), number, str(error))


def files(paths) -> list[Path]:
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise DataError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file")
            found += inside
        elif not path.is_file():
            raise DataError(f"{path}: there is no such file")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: not a {' or '.join(SUFFIXES)} file; scripts/prepare_data.py folder makes one")
        else:
            found.append(path)
    return found


def _lines(file: Path) -> Iterator[tuple[int, bytes | BadRow]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as opened:
            while line := opened.readline(MAX_ROW):
                number += 1
                if len(line) == MAX_ROW and not line.endswith(b"\n"):
                    yield number, BadRow(str(file), number, f"the line is longer than {MAX_ROW} bytes")
                    while (rest := opened.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                        pass
                else:
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except EOFError:
        raise DataError(f"{file}: the file is cut off after line {number}; fetch or write it again") from None
    except (zlib.error, OSError) as error:
        raise DataError(f"{file}: the file is damaged, or cannot be read after line {number} ({error}); fetch or write it "
                        "again") from None


def parse(line: bytes, where: str) -> Document:
    """One row. Raises ValueError with the reason where it is none of the known forms."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but a {type(row).__name__}")
    for keys, build in FORMS.items():
        if all(row.get(key) is not None for key in keys):
            document = build(row, where)
            if any("\0" in text for text in document.texts()):
                raise ValueError("a text holds a NUL character")
            try:
                document.content().encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("a text holds half of a surrogate pair") from None
            return document
    names = [name for name in sorted(row) if NAME.fullmatch(name)][:6]
    others = f" and {len(row) - len(names)} others" if len(row) > len(names) else ""
    raise ValueError(f"unknown fields ({', '.join(names)}{others}); a row has messages, query and response, "
                     "instruction and output, prompt and completion, or text")


def _text(row: dict, key: str, *, empty: bool = False) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


def _messages(messages) -> tuple[dict, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a list of messages, or is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} has no role")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            role = f" ({message['role']})" if NAME.fullmatch(message["role"]) else ""
            raise ValueError(f"message {i}{role} has no text as its content")
    return tuple(messages)


def _turns(where, system, history, query, response) -> Document:
    messages = [{"role": "system", "content": system}] if system else []
    for pair in (*history, (query, response)):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            raise ValueError("'history' is not a list of [query, response] pairs of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Document(where, messages=tuple(messages))


def _query(row, where):
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError("'history' is not a list")
    return _turns(where, _text(row, "system", empty=True), history, _text(row, "query"), _text(row, "response"))


def _instruction(row, where):
    question = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input", empty=True)) if part)
    return _turns(where, _text(row, "system", empty=True), [], question, _text(row, "output"))


def _prompt(row, where):
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return Document(where, messages=_messages(row["prompt"] + row["completion"]), given=len(row["prompt"]))
    return Document(where, prompt=_text(row, "prompt", empty=True), text=_text(row, "completion"))


FORMS = {
    ("messages",): lambda row, where: Document(where, messages=_messages(row["messages"])),
    ("query", "response"): _query,
    ("instruction", "output"): _instruction,
    ("prompt", "completion"): _prompt,
    ("text",): lambda row, where: Document(where, text=_text(row, "text")),
}
