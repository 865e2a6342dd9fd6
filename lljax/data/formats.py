"""Parses rows into documents. A row that cannot be read becomes a `BadRow`, never an exception."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from lljax.data import sources
from lljax.data.messages import (
    LOSS,
    MAX_DEPTH,
    MEDIA,
    MESSAGE,
    NAME,
    deeper,
    normalized,
    parse_json,
)
from lljax.data.sources import MAX_ROW_BYTES
from lljax.errors import printable


@dataclasses.dataclass(frozen=True)
class Document:
    """Training data: a conversation (`messages`), a continuation (`prompt`, `text`) or `text`."""

    where: str  # "file:line"
    messages: tuple[dict, ...] = ()
    prompt: str = ""
    text: str = ""
    given: int = 0  # the number of messages that are a prompt and not trained
    tools: tuple[dict, ...] = ()  # in the form of chat templates
    untrained: frozenset[int] = frozenset()  # indices of messages whose loss is off
    unread: tuple[str, ...] = ()  # keys of the row that no reader knows

    def texts(self) -> list[str]:
        return [
            self.prompt,
            self.text,
            *(message.get("content") or "" for message in self.messages),
        ]

    def content(self) -> str:
        """The content in a canonical form: equal documents have equal content."""
        content = [self.messages, self.prompt, self.text, *([self.tools] if self.tools else [])]
        return json.dumps(content, sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class BadRow:
    file: str
    line: int  # in an array: the number of the row
    reason: str  # logged, so without text of the row

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}: {self.reason}"


def read(
    paths: Iterable[str | Path], *, max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[Document | BadRow]:
    """Every row of `sources.files(paths)`.

    Raises:
      DataError: as `sources.files` and `sources.rows`.
    """
    for file in sources.files(paths):
        yield from read_file(file, max_row_bytes=max_row_bytes)


def read_file(
    file: Path, *, max_row_bytes: int = MAX_ROW_BYTES, expected: str | None = None
) -> Iterator[Document | BadRow]:
    """Every row of one file. Arguments and errors: see `sources.rows`."""
    for number, row in sources.rows(file, max_row_bytes=max_row_bytes, expected=expected):
        try:
            if isinstance(row, ValueError):
                raise row
            where = f"{file}:{number}"
            yield parse(row, where) if isinstance(row, bytes) else document(row, where)
        except ValueError as error:
            yield BadRow(str(file), number, str(error))


def parse(line: bytes, where: str) -> Document:
    """The document of one row. Raises ValueError with the reason if its form is unknown."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return document(row, where)


def document(row: Any, where: str) -> Document:
    """The document of a decoded row. Raises ValueError as `parse`."""
    if not isinstance(row, dict):
        hint = "; an array of rows is read from a .json file" if isinstance(row, list) else ""
        raise ValueError(f"not a JSON object but a {type(row).__name__}{hint}")
    if deeper(row, MAX_DEPTH):
        raise ValueError(f"nested too deeply (more than {MAX_DEPTH} lists and objects)")
    for key, reason in REFUSED.items():
        if _is_filled(row.get(key)):
            raise ValueError(f"{key!r}: {reason}")
    if isinstance(row.get("label"), bool) and "text" not in row:  # KTO
        raise ValueError(f"'label': {PAIRS}")
    form = next(
        (form for form in FORMS if all(row.get(key) is not None for key in form.needs)), None
    )
    if form is None:
        names = [key for key in sorted(row) if NAME.fullmatch(key)][:6]
        others = f" and {len(row) - len(names)} others" if len(row) > len(names) else ""
        raise ValueError(
            f"unknown fields ({', '.join(names)}{others}); a row has messages or "
            "conversations, query and response, instruction and output, prompt and "
            "completion, or text"
        )
    parsed = form.build(row, where)
    if any("\0" in text for text in parsed.texts()):
        raise ValueError("a text holds a NUL character")
    try:
        parsed.content().encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
    others = _unread(row, {*form.needs, *form.reads})
    return dataclasses.replace(parsed, unread=(*parsed.unread, *others)) if others else parsed


def _is_filled(value: Any) -> bool:
    """Whether a value says anything: tables fill absent keys with None and empty values."""
    return value is not None and value != "" and value != [] and value != {}


def _unread(row: dict, known: Set[str], prefix: str = "") -> list[str]:
    """The filled keys that are not `known`; keys that may be a user's text share one name."""
    others = [key for key in row.keys() - known if _is_filled(row[key])]
    return sorted({prefix + (key if NAME.fullmatch(key) else "(no name)") for key in others})


def _text(row: dict, key: str, *, empty: bool = False) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


# ---------------------------------------------------------------- conversations
SYSTEM = ("system", "system_prompt")  # keys of a row


def _conversation(row: dict, where: str, messages: list, prompt: Sequence = ()) -> Document:
    """A conversation with the system prompt and the tools of its row.

    prompt: messages that come first and are not trained.
    """
    turns = normalized(prompt, 0)
    given = len(turns)
    turns += normalized(messages, len(prompt))
    if system := _system(row):
        first = turns[0] if turns and turns[0]["role"] in ("system", "developer") else None
        if first is None:
            turns, given = [{"role": "system", "content": system}, *turns], given + bool(given)
        elif first.get("content") != system:
            raise ValueError("'system' and the first message are two system prompts")
    replies = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given}
    untrained, unread = set(), set()
    for i, turn in enumerate(turns):
        for key in turn.keys() & LOSS:
            if turn[key] == 0:
                untrained.add(i)
            elif turn[key] == 1 and i not in replies:
                unread.add(f"messages.{key} (on, of no trained reply)")
        unread.update(_unread(turn, MESSAGE, "messages."))
    if not replies:
        raise ValueError("the conversation has no assistant message")
    if replies <= untrained:
        raise ValueError("the loss of every assistant message is off")
    return Document(
        where,
        messages=tuple(turns),
        given=given,
        tools=_tools(row),
        untrained=frozenset(untrained),
        unread=tuple(sorted(unread)),
    )


def _system(row: dict) -> str:
    texts = {text for key in SYSTEM if (text := _text(row, key, empty=True)).strip()}
    if len(texts) > 1:
        raise ValueError(f"{' and '.join(map(repr, SYSTEM))} are two system prompts")
    return texts.pop() if texts else ""


def _tools(row: dict) -> tuple[dict, ...]:
    tools = row.get("tools") or []
    tools = parse_json(tools, "'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is no list of tools (objects, or their JSON)")
    return tuple(tools)


# ---------------------------------------------------------------- forms
def _messages(key: str) -> Callable[[dict, str], Document]:
    def build(row: dict, where: str) -> Document:
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{key!r} is not a list of messages, or is empty")
        return _conversation(row, where, row[key])

    return build


def _query(row: dict, where: str) -> Document:
    return _replies(row, where, _text(row, "query"), _text(row, "response"))


def _instruction(row: dict, where: str) -> Document:
    parts = (_text(row, "instruction"), _text(row, "input", empty=True))
    return _replies(row, where, "\n".join(part for part in parts if part), _text(row, "output"))


def _replies(row: dict, where: str, query: str, response: str) -> Document:
    history = row.get("history") or []
    if not (
        isinstance(history, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    ):
        raise ValueError("'history' is not a list of [query, response] pairs of texts")
    pairs = [*history, (query, response)]
    return _conversation(
        row,
        where,
        [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ],
    )


def _prompt(row: dict, where: str) -> Document:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(row, where, completion, prompt)
    if _system(row) or _tools(row):  # only conversations have them
        return _conversation(
            row,
            where,
            [{"role": "assistant", "content": _text(row, "completion")}],
            [{"role": "user", "content": _text(row, "prompt")}],
        )
    return Document(where, prompt=_text(row, "prompt", empty=True), text=_text(row, "completion"))


def _plain(row: dict, where: str) -> Document:
    return Document(where, text=_text(row, "text"))


@dataclasses.dataclass(frozen=True)
class Form:
    """`build` parses rows with all keys of `needs`, and may also read the keys of `reads`."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    build: Callable[[dict, str], Document]


FORMS = (  # the first form whose keys a row has
    Form(("messages",), (*SYSTEM, "tools"), _messages("messages")),
    Form(("conversations",), (*SYSTEM, "tools"), _messages("conversations")),
    Form(("conversation",), (*SYSTEM, "tools"), _messages("conversation")),
    Form(("query", "response"), ("history", *SYSTEM, "tools"), _query),
    Form(("instruction", "output"), ("input", "history", *SYSTEM, "tools"), _instruction),
    Form(("prompt", "completion"), (*SYSTEM, "tools"), _prompt),
    Form(("text",), (), _plain),
)
PAIRS = (
    "a row of preferences, which need a preference objective; to train the better answer alone, "
    "give it as a reply or completion"
)
REFUSED = {  # keys that give a row another meaning
    "chosen": PAIRS,
    "rejected": PAIRS,
    "rejected_response": PAIRS,
    "rejected_messages": PAIRS,
    "image": MEDIA,
    "images": MEDIA,
    "video": MEDIA,
    "videos": MEDIA,
    "audio": MEDIA,
    "audios": MEDIA,
}
