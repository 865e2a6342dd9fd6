"""Rows in, documents out. A row that cannot be read becomes a `BadRow` with its place, never an exception."""

import codecs
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lljax.errors import DataError
from lljax.files import first_line, printable

LINES = (".jsonl", ".jsonl.gz")              # one row a line
ARRAYS = (".json", ".json.gz")               # one array of rows, or one row a line; read where a path names the file
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")       # of a field or role; what else stands there may be a text
MAX_ROW_BYTES = 16 << 20                     # the default of data.max_row_bytes
MAX_DEPTH = 64                               # lists and objects inside one another; JSON schemas of tools take about 20
CHUNK = 1 << 20                              # bytes read at a time
DATASETS = "the datasets library converts it: load_dataset({kind!r}, data_files=...)['train'].to_json('rows.jsonl')"
FOREIGN = {                                  # how other files become JSONL, by suffix
    ".parquet": DATASETS.format(kind="parquet"), ".arrow": DATASETS.format(kind="arrow"),
    ".csv": DATASETS.format(kind="csv"), ".zip": "unzip it", ".zst": "unzstd it", ".xz": "unxz it", ".bz2": "bunzip2 it"}


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
    unread: tuple[str, ...] = ()             # keys of the row that no reader knows

    def texts(self) -> list[str]:
        return [self.prompt, self.text, *(message.get("content") or "" for message in self.messages)]

    def content(self) -> str:
        """Its content in one canonical form: what tells documents apart."""
        content = [self.messages, self.prompt, self.text, *([self.tools] if self.tools else [])]
        return json.dumps(content, sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class BadRow:
    file: str
    line: int                                # of an array: the number of the row
    reason: str                              # which goes to logs, and therefore holds no text of the row

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}: {self.reason}"


# ---------------------------------------------------------------- files
def read(paths, *, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Document | BadRow]:
    """Every row of `files(paths)`.

    Raises:
      DataError: as `files` and `read_file`.
    """
    for file in files(paths):
        yield from read_file(file, max_row_bytes=max_row_bytes)


def files(paths, *, field: str = "") -> list[Path]:
    """The files of rows that `paths` name: files, and folders of JSONL, in sorted order. field: what an error says named them.

    Raises:
      DataError: a path is missing or no file of rows, or a folder holds none.
    """
    found, named = [], f"{field}: " if field else ""
    for path in map(Path, map(os.path.expanduser, paths)):
        shown = named + printable(str(path))
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(LINES) and p.is_file()) if is_folder else []
        except OSError as error:
            raise DataError(f"{named}{printable(str(path)[:80])}: {first_line(error)[:60]}") from None
        if is_folder:
            if not inside:
                raise DataError(f"{shown}: the folder holds no {' or '.join(LINES)} file (name a .json file itself)")
            found += inside
        elif not is_file:
            raise DataError(f"{shown}: there is no such file; scripts/prepare_data.py makes one of a folder of texts, or of "
                            "Python's library")
        elif not path.name.endswith(LINES + ARRAYS):
            advice = FOREIGN.get(path.suffix, "scripts/prepare_data.py folder makes one of a folder of texts")
            raise DataError(f"{shown}: not a {', '.join(LINES + ARRAYS)} file; {advice}")
        else:
            found.append(path)
    return found


def sha256(file: Path) -> str:
    """Of the bytes of a file.

    Raises:
      DataError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{printable(str(file))}: it cannot be read ({error.strerror.lower()})") from None


def read_file(file: Path, *, max_row_bytes: int = MAX_ROW_BYTES, expected: str | None = None) -> Iterator[Document | BadRow]:
    """Every row of one file, without loading it whole. expected: the sha256 that the file had before.

    Raises:
      DataError: the file cannot be read to its end; a .gz file is damaged, which its checksum shows at its end, when rows that
        are not as they were have been taken for sound; an array is not JSON; the bytes that were read are not those expected.
    """
    shown, number = printable(str(file)), 0
    try:
        with _Hashed(file) as raw, io.BufferedReader(raw, CHUNK) as whole:
            with gzip.open(whole) if file.suffix == ".gz" else whole as opened:
                array = file.name.endswith(ARRAYS) and opened.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
                for number, row in (_array if array else _lines)(opened, max_row_bytes):
                    yield _read(row, str(file), number)
                while whole.read(CHUNK):     # what may stand behind the end of a .gz
                    pass
    except EOFError:
        raise DataError(f"{shown}: the file is cut off after row {number}; fetch or write it again") from None
    except _NotAnArray as error:
        raise DataError(f"{shown}: {error}") from None
    except (zlib.error, OSError) as error:
        raise DataError(f"{shown}: the file is damaged, or cannot be read after row {number} ({error}); fetch or write it "
                        "again") from None
    if expected not in (None, raw.digest.hexdigest()):
        raise DataError(f"{shown}: the file changed while it was read, and nothing of it is kept: give the same command again "
                        "when it is complete")


class _Hashed(io.RawIOBase):
    """The bytes of a file; `digest` is of those that were read."""

    def __init__(self, file: Path):
        self._file, self.digest = open(file, "rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _TooLong(ValueError):
    """A row above data.max_row_bytes."""

    def __init__(self, limit: int):
        super().__init__(f"the row is longer than data.max_row_bytes={limit}")


class _NotAnArray(ValueError):
    """Why an array cannot be read on."""


def _lines(opened, limit: int) -> Iterator[tuple[int, bytes | ValueError]]:
    """(line, row) of one row a line."""
    number = 0
    while line := opened.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            yield number, _TooLong(limit)
            while (rest := opened.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
        elif line.strip():
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _array(opened, limit: int) -> Iterator[tuple[int, object]]:
    """(number, row) of one JSON array, which is never in memory as a whole."""
    text, number, decode = _Text(opened), 0, json.JSONDecoder().raw_decode
    try:
        text.take("[")
        while text.next() != "]":
            try:
                row, end = decode(text.read, text.at)
            except RecursionError:
                raise _NotAnArray(f"row {number + 1} is nested too deeply") from None
            except ValueError as error:      # or the rest of the row has not been read yet
                if len(text.read) - text.at > limit:
                    raise _NotAnArray(f"row {number + 1} is longer than data.max_row_bytes={limit}, "
                                      "or not JSON") from None
                if not text.more():
                    raise _NotAnArray(f"row {number + 1} is not JSON ({error.msg}), or the file is "
                                      "cut off") from None
                continue
            number, length, text.at = number + 1, end - text.at, end
            yield number, _TooLong(limit) if length > limit else row
            if not text.take(",") and text.next() != "]":
                raise _NotAnArray(f"the array does not go on after row {number}, or is cut off")
        text.take("]")
        if text.next():
            raise _NotAnArray(f"something follows the array of {number} rows")
    except UnicodeDecodeError:
        raise _NotAnArray(f"not UTF-8 after row {number}") from None


class _Text:
    """The text of a file that is read on as it is needed: `read`, done with up to `at`."""

    def __init__(self, opened):
        self.read, self.at = "", 0
        self._opened, self._decoder = opened, codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Reads on; False at the end. Doubles what is held, so that a long row is not parsed too often."""
        new = self._opened.read(max(CHUNK, len(self.read) - self.at))
        self.read, self.at = self.read[self.at:] + self._decoder.decode(new, final=not new), 0
        return bool(new)

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = SPACE.match(self.read, self.at).end()
            if self.at < len(self.read) or not self.more():
                return self.read[self.at:self.at + 1]

    def take(self, sign: str) -> bool:
        """Whether `sign` is next; moves behind it."""
        found = self.next() == sign
        self.at += found
        return found


SPACE = re.compile(r"[ \t\n\r]*")


# ---------------------------------------------------------------- rows
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
    return document(row, where)


def document(row, where: str) -> Document:
    """The document of a decoded row. Raises ValueError as `parse`."""
    if not isinstance(row, dict):
        hint = "; an array of rows is read from a .json file" if isinstance(row, list) else ""
        raise ValueError(f"not a JSON object but a {type(row).__name__}{hint}")
    if _deeper(row, MAX_DEPTH):
        raise ValueError(f"nested too deeply (more than {MAX_DEPTH} lists and objects)")
    for key, reason in REFUSED.items():
        if _given(row.get(key)):
            raise ValueError(f"{key!r}: {reason}")
    if isinstance(row.get("label"), bool) and "text" not in row:         # KTO
        raise ValueError(f"'label': {PAIRS}")
    form = next((form for form in FORMS if all(row.get(key) is not None for key in form.needs)), None)
    if form is None:
        names = [key for key in sorted(row) if NAME.fullmatch(key)][:6]
        others = f" and {len(row) - len(names)} others" if len(row) > len(names) else ""
        raise ValueError(f"unknown fields ({', '.join(names)}{others}); a row has messages or conversations, query and "
                         "response, instruction and output, prompt and completion, or text")
    found = form.build(row, where)
    if any("\0" in text for text in found.texts()):
        raise ValueError("a text holds a NUL character")
    try:
        found.content().encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
    others = _unread(row, {*form.needs, *form.reads})
    return dataclasses.replace(found, unread=(*found.unread, *others)) if others else found


def _read(row, file: str, number: int) -> Document | BadRow:
    where = f"{file}:{number}"
    try:
        if isinstance(row, ValueError):
            raise row
        return parse(row, where) if isinstance(row, bytes) else document(row, where)
    except ValueError as error:
        return BadRow(file, number, str(error))


def _given(value) -> bool:
    """Whether a key says anything: tables of rows have every key in every row."""
    return value is not None and value != "" and value != [] and value != {}


def _unread(row: dict, known, prefix: str = "") -> list[str]:
    """The keys of a row or message that say something and are not `known`; those that may be a text under one name."""
    others = row.keys() - known
    return sorted({prefix + (key if NAME.fullmatch(key) else "(no name)") for key in others if _given(row[key])}) if others else []


def _deeper(value, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(each, levels - 1) for each in inside if isinstance(each, (dict, list)))


def _text(row: dict, key: str, *, empty: bool = False) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


# ---------------------------------------------------------------- conversations
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool", "tool_response": "tool"}
CALLS = ("function_call", "tool_call")       # roles of a message whose content is a call in JSON (ShareGPT, ms-swift)
SENDERS = ("system", "developer", "user", "assistant", "tool")       # of ShareGPT's `from`, after ROLES
TEXT_PARTS = ("text", "input_text", "output_text")
LOSS = frozenset({"weight", "train", "training", "loss", "loss_scale", "loss_mask"})     # OpenAI, Mistral, axolotl, ms-swift
MESSAGE = LOSS | {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}


def _conversation(row: dict, where: str, messages: list, prompt: list = ()) -> Document:
    """A conversation with the system prompt and the tools of its row; the messages of `prompt` come first and are not trained."""
    turns = _turns(prompt, 0)
    given = len(turns)
    turns += _turns(messages, len(prompt))
    if system := _system(row):
        if turns[0]["role"] not in ("system", "developer"):
            turns, given = [{"role": "system", "content": system}, *turns], given + bool(given)
        elif turns[0]["content"] != system:
            raise ValueError("'system' and the first message are two system prompts")
    untrained, unread = set(), set()
    for i, turn in enumerate(turns):
        for key in turn.keys() & LOSS:
            if turn[key] == 0:
                untrained.add(i)
            elif turn[key] and turn["role"] != "assistant":
                unread.add(f"messages.{key} (of no reply)")
        unread.update(_unread(turn, MESSAGE, "messages."))
    replies = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given}
    if not replies:
        raise ValueError("the conversation has no assistant message")
    if replies <= untrained:
        raise ValueError("the loss of every assistant message is off")
    return Document(where, messages=tuple(turns), given=given, tools=_tools(row), untrained=frozenset(untrained),
                    unread=tuple(sorted(unread)))


def _turns(messages: list, first: int) -> list[dict]:
    """Messages as chat templates take them. A call becomes part of the reply before it, as ms-swift's templates show it."""
    turns = []
    for i, message in enumerate(messages, first):
        if isinstance(message, dict) and set(message) == {"human", "assistant"}:         # a pair of ms-swift's
            pair = ({"role": role, "content": message[key]} for role, key in (("user", "human"), ("assistant", "assistant")))
            turns += [_turn(i, each) for each in pair]
            continue
        turn = _turn(i, message)
        if turn["role"] in CALLS:
            turn = _call(i, turn)
            if turns and turns[-1]["role"] == "assistant" and all(turns[-1].get(key) == turn.get(key) for key in LOSS):
                before = turns.pop()
                turn = before | turn | {"content": before["content"],
                                        "tool_calls": [*before.get("tool_calls", ()), *turn["tool_calls"]]}
        turns.append(turn)
    return turns


def _turn(i: int, message) -> dict:
    shared = isinstance(message, dict) and "from" in message and "role" not in message
    if shared:
        message = {"role": message["from"], "content": message.get("value")} | {
            key: value for key, value in message.items() if key not in ("from", "value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {i} has no role")
    role, content = ROLES.get(message["role"], message["role"]), message.get("content")
    named = f" ({role})" if NAME.fullmatch(role) else ""
    if shared and role not in SENDERS + CALLS:
        raise ValueError(f"message {i}{named} is from none of human, gpt, {', '.join(SENDERS + CALLS)}")
    if isinstance(content, list):
        content = "".join(_part(i, part) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"message {i}{named} has no text as its content")
    for key in message.keys() & LOSS:
        if message[key] not in (None, 0, 1):
            raise ValueError(f"message {i}{named}: {key!r} is neither 0 nor 1")
    unchanged = role == message["role"] and content is message.get("content")
    return message if unchanged else message | {"role": role, "content": content}


def _part(i: int, part) -> str:
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    named = f" ({kind})" if isinstance(kind, str) and NAME.fullmatch(kind) else ""
    raise ValueError(f"message {i}: a part of its content{named} is no text, and models of text alone are trained")


def _call(i: int, turn: dict) -> dict:
    calls = _json(turn["content"] or "", f"message {i} ({turn['role']})")
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"message {i} ({turn['role']}) is no call: a JSON object with name and arguments")
        arguments = call.get("arguments", {})
        arguments = _json(arguments, f"message {i}: 'arguments'") if isinstance(arguments, str) else arguments
        made.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return turn | {"role": "assistant", "content": "", "tool_calls": made}


def _system(row: dict) -> str:
    found = {_text(row, key, empty=True) for key in SYSTEM} - {""}
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(repr, SYSTEM))} are two system prompts")
    return found.pop() if found else ""


def _tools(row: dict) -> tuple[dict, ...]:
    tools = row.get("tools") or []
    tools = _json(tools, "'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is no list of tools (objects, or their JSON)")
    return tuple(tools)


def _json(text: str, what: str):
    """JSON inside a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not JSON") from None
    if _deeper(value, MAX_DEPTH):
        raise ValueError(f"{what} is nested too deeply")
    return value


# ---------------------------------------------------------------- forms
SYSTEM = ("system", "system_prompt")


def _of_messages(key: str):
    def build(row, where):
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{key!r} is not a list of messages, or is empty")
        return _conversation(row, where, row[key])
    return build


def _query(row, where):
    return _replies(row, where, _text(row, "query"), _text(row, "response"))


def _instruction(row, where):
    question = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input", empty=True)) if part)
    return _replies(row, where, question, _text(row, "output"))


def _replies(row, where, query: str, response: str) -> Document:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' is not a list of [query, response] pairs of texts")
    pairs = [*history, (query, response)]
    return _conversation(row, where, [{"role": role, "content": text} for pair in pairs
                                      for role, text in zip(("user", "assistant"), pair)])


def _prompt(row, where):
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(row, where, completion, prompt)
    if _system(row) or _tools(row):          # which exist in conversations alone
        turns = [{"role": "user", "content": _text(row, "prompt")}, {"role": "assistant", "content": _text(row, "completion")}]
        return _conversation(row, where, turns[1:], turns[:1])
    return Document(where, prompt=_text(row, "prompt", empty=True), text=_text(row, "completion"))


@dataclasses.dataclass(frozen=True)
class Form:
    """A row that has every key of `needs` is read by `build`, which reads those of `reads` too where they are there."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    build: Callable[[dict, str], Document]


FORMS = (                                    # the first that a row has the keys of
    Form(("messages",), (*SYSTEM, "tools"), _of_messages("messages")),
    Form(("conversations",), (*SYSTEM, "tools"), _of_messages("conversations")),
    Form(("conversation",), (*SYSTEM, "tools"), _of_messages("conversation")),
    Form(("query", "response"), ("history", *SYSTEM, "tools"), _query),
    Form(("instruction", "output"), ("input", "history", *SYSTEM, "tools"), _instruction),
    Form(("prompt", "completion"), (*SYSTEM, "tools"), _prompt),
    Form(("text",), (), lambda row, where: Document(where, text=_text(row, "text"))),
)
PAIRS = "a row of preferences, which need a preference objective; to train the better answer, give it as completion or reply"
MEDIA = "models of text alone are trained"
REFUSED = {                                  # keys that change what a row asks for
    "chosen": PAIRS, "rejected": PAIRS, "rejected_response": PAIRS, "rejected_messages": PAIRS,
    "image": MEDIA, "images": MEDIA, "video": MEDIA, "videos": MEDIA, "audio": MEDIA, "audios": MEDIA}
