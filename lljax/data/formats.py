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


# A decoded row and its place -> what it says; raises ValueError with the reason if it says nothing.
Parse = Callable[[Any, str], Any]


def document(row: Any, where: str) -> Document:
    """The document of a decoded row. Raises ValueError with the reason if its form is unknown."""
    row = checked(row)
    for key, reason in PREFERENCES.items():
        if is_filled(row.get(key)):
            raise ValueError(f"{key!r}: {reason}")
    if isinstance(row.get("label"), bool) and "text" not in row:
        raise ValueError(f"'label': {JUDGED}")
    return by_form(
        row,
        where,
        FORMS,
        "a row has messages or conversations, query and response, instruction and output, prompt "
        "and completion, or text",
    )


def read(
    paths: Iterable[str | Path], *, max_row_bytes: int = MAX_ROW_BYTES, parse_row: Parse = document
) -> Iterator[Any]:
    """Every row of `sources.files(paths)`: the result of `parse_row`, or a BadRow.

    Raises:
      DataError: as `sources.files` and `sources.rows`.
    """
    for file in sources.files(paths):
        yield from read_file(file, max_row_bytes=max_row_bytes, parse_row=parse_row)


def read_file(
    file: Path,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    expected: str | None = None,
    parse_row: Parse = document,
) -> Iterator[Any]:
    """Every row of one file. Arguments and errors: see `sources.rows`."""
    for number, row in sources.rows(file, max_row_bytes=max_row_bytes, expected=expected):
        try:
            if isinstance(row, ValueError):
                raise row
            where = f"{file}:{number}"
            yield parse(row, where, parse_row) if isinstance(row, bytes) else parse_row(row, where)
        except ValueError as error:
            yield BadRow(str(file), number, str(error))


def parse(line: bytes, where: str, parse_row: Parse = document) -> Any:
    """What one line of a file says. Raises ValueError with the reason if its form is unknown."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return parse_row(row, where)


# ---------------------------------------------------------------- parts of a row
def checked(row: Any) -> dict:
    """A decoded row. Raises ValueError if it is no object, nested too deeply, or holds media."""
    if not isinstance(row, dict):
        hint = "; an array of rows is read from a .json file" if isinstance(row, list) else ""
        raise ValueError(f"not a JSON object but a {type(row).__name__}{hint}")
    if deeper(row, MAX_DEPTH):
        raise ValueError(f"nested too deeply (more than {MAX_DEPTH} lists and objects)")
    for key in MEDIA_KEYS:
        if is_filled(row.get(key)):
            raise ValueError(f"{key!r}: {MEDIA}")
    return row


def by_form(row: dict, where: str, forms: "Iterable[Form]", advice: str) -> Any:
    """The row as the first of `forms` whose keys it has parses it, with its unread keys.

    advice: the known forms, for the error.
    """
    form = next(
        (form for form in forms if all(row.get(key) is not None for key in form.needs)), None
    )
    if form is None:
        names = [key for key in sorted(row) if NAME.fullmatch(key)][:6]
        others = f" and {len(row) - len(names)} others" if len(row) > len(names) else ""
        raise ValueError(f"unknown fields ({', '.join(names)}{others}); {advice}")
    parsed = form.build(row, where)
    check_texts(parsed.texts(), parsed.content())
    others = unread_in(row, {*form.needs, *form.reads})
    return dataclasses.replace(parsed, unread=(*parsed.unread, *others)) if others else parsed


def check_texts(texts: Iterable[str], content: str) -> None:
    """Raises ValueError if a text, or the content as a whole, cannot be tokenized."""
    if any("\0" in text for text in texts):
        raise ValueError("a text holds a NUL character")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None


def is_filled(value: Any) -> bool:
    """Whether a value says anything: tables fill absent keys with None and empty values."""
    return value is not None and value != "" and value != [] and value != {}


def unread_in(row: dict, known: Set[str], prefix: str = "") -> list[str]:
    """The filled keys that are not `known`; keys that may be a user's text share one name."""
    others = [key for key in row.keys() - known if is_filled(row[key])]
    return sorted({prefix + (key if NAME.fullmatch(key) else "(no name)") for key in others})


def text_of(row: dict, key: str, *, empty: bool = False) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


# ---------------------------------------------------------------- conversations
TURNS = ("messages", "conversations", "conversation")  # keys of a row: a list of messages
SYSTEM = ("system", "system_prompt")  # keys of a row


def conversation(row: dict, where: str, messages: Sequence, prompt: Sequence = ()) -> Document:
    """A conversation with the system prompt and the tools of its row.

    prompt: messages that come first and are not trained.
    """
    turns = normalized(prompt, 0)
    given = len(turns)
    turns += normalized(messages, len(prompt))
    before = len(turns)
    turns = with_system(row, turns)
    given += bool(given) * (len(turns) - before)
    replies = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given}
    untrained, unread = set(), set()
    for i, turn in enumerate(turns):
        for key in turn.keys() & LOSS:
            if turn[key] == 0:
                untrained.add(i)
            elif turn[key] == 1 and i not in replies:
                unread.add(f"messages.{key} (on, of no trained reply)")
        unread.update(unread_in(turn, MESSAGE, "messages."))
    if not replies:
        raise ValueError("the conversation has no assistant message")
    if replies <= untrained:
        raise ValueError("the loss of every assistant message is off")
    return Document(
        where,
        messages=tuple(turns),
        given=given,
        tools=tools_of(row),
        untrained=frozenset(untrained),
        unread=tuple(sorted(unread)),
    )


def with_system(row: dict, turns: list[dict]) -> list[dict]:
    """The messages after the system prompt of the row, if it has one."""
    if not (prompt := system_of(row)):
        return turns
    first = turns[0] if turns and turns[0]["role"] in ("system", "developer") else None
    if first is None:
        return [{"role": "system", "content": prompt}, *turns]
    if first.get("content") != prompt:
        raise ValueError("'system' and the first message are two system prompts")
    return turns


def system_of(row: dict) -> str:
    texts = {text for key in SYSTEM if (text := text_of(row, key, empty=True)).strip()}
    if len(texts) > 1:
        raise ValueError(f"{' and '.join(map(repr, SYSTEM))} are two system prompts")
    return texts.pop() if texts else ""


def tools_of(row: dict) -> tuple[dict, ...]:
    tools = row.get("tools") or []
    tools = parse_json(tools, "'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is no list of tools (objects, or their JSON)")
    return tuple(tools)


# ---------------------------------------------------------------- forms
def _messages(key: str) -> Callable[[dict, str], Document]:
    return lambda row, where: conversation(row, where, messages_of(row, key))


def messages_of(row: dict, key: str) -> list:
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(f"{key!r} is not a list of messages, or is empty")
    return row[key]


def _query(row: dict, where: str) -> Document:
    return _replies(row, where, text_of(row, "query"), text_of(row, "response"))


def _instruction(row: dict, where: str) -> Document:
    return _replies(row, where, instruction_of(row), text_of(row, "output"))


def instruction_of(row: dict) -> str:
    """`instruction` and `input`, as one text."""
    parts = (text_of(row, "instruction"), text_of(row, "input", empty=True))
    return "\n".join(part for part in parts if part)


def _replies(row: dict, where: str, query: str, response: str) -> Document:
    reply = {"role": "assistant", "content": response}
    return conversation(row, where, [*asked(row, query), reply])


def asked(row: dict, query: str) -> list[dict]:
    """The messages of `history`, and the user's message `query`."""
    history = row.get("history") or []
    if not (
        isinstance(history, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    ):
        raise ValueError("'history' is not a list of [query, response] pairs of texts")
    turns = [
        {"role": role, "content": content}
        for pair in history
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*turns, {"role": "user", "content": query}]


def _prompt(row: dict, where: str) -> Document:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation(row, where, completion, prompt)
    if system_of(row) or tools_of(row):  # only conversations have them
        return conversation(
            row,
            where,
            [{"role": "assistant", "content": text_of(row, "completion")}],
            [{"role": "user", "content": text_of(row, "prompt")}],
        )
    return Document(
        where, prompt=text_of(row, "prompt", empty=True), text=text_of(row, "completion")
    )


def _plain(row: dict, where: str) -> Document:
    return Document(where, text=text_of(row, "text"))


@dataclasses.dataclass(frozen=True)
class Form:
    """`build` parses rows with all keys of `needs`, and may also read the keys of `reads`."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    build: Parse


FORMS = (  # the first form whose keys a row has
    *(Form((key,), (*SYSTEM, "tools"), _messages(key)) for key in TURNS),
    Form(("query", "response"), ("history", *SYSTEM, "tools"), _query),
    Form(("instruction", "output"), ("input", "history", *SYSTEM, "tools"), _instruction),
    Form(("prompt", "completion"), (*SYSTEM, "tools"), _prompt),
    Form(("text",), (), _plain),
)
ANSWER = "; to train the better answer alone, give it as a reply or completion"
PAIR = f"a pair of answers, which objective.name='dpo' and its kin train{ANSWER}"
JUDGED = f"a judged answer, which objective.name='kto' trains{ANSWER}"
PREFERENCES = {  # keys that give a row another meaning
    "chosen": PAIR,
    "rejected": PAIR,
    "rejected_response": PAIR,
    "rejected_messages": PAIR,
    "kto_tag": JUDGED,
}
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
