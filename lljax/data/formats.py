"""Rows in, documents out. A row that cannot be read becomes a `BadRow`, never an exception."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lljax.data import sources
from lljax.data.sources import MAX_ROW_BYTES
from lljax.errors import printable

# The name of a field or role; what else stands in its place may be a text.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
MAX_DEPTH = 64  # of lists and objects; JSON schemas of tools take 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A conversation (`messages`), a continuation (`prompt`, `text`) or plain `text`, to train
    on.
    """

    where: str  # "file:line"
    messages: tuple[dict, ...] = ()
    prompt: str = ""
    text: str = ""
    given: int = 0  # how many messages are a prompt, not to be trained
    tools: tuple[dict, ...] = ()  # as chat templates take them
    untrained: frozenset[int] = frozenset()  # indices of messages whose loss is off
    unread: tuple[str, ...] = ()  # keys of the row that no reader knows

    def texts(self) -> list[str]:
        return [
            self.prompt,
            self.text,
            *(message.get("content") or "" for message in self.messages),
        ]

    def content(self) -> str:
        """Its content in one canonical form: what tells documents apart."""
        content = [self.messages, self.prompt, self.text, *([self.tools] if self.tools else [])]
        return json.dumps(content, sort_keys=True, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class BadRow:
    file: str
    line: int  # of an array: the number of the row
    reason: str  # goes to logs: it holds no text of the row

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}: {self.reason}"


def read(paths, *, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Document | BadRow]:
    """Every row of `sources.files(paths)`.

    Raises:
      DataError: as `sources.files` and `sources.rows`.
    """
    for file in sources.files(paths):
        yield from read_file(file, max_row_bytes=max_row_bytes)


def read_file(file: Path, **how) -> Iterator[Document | BadRow]:
    """Every row of one file. how: as for `sources.rows`, which says what it raises."""
    for number, row in sources.rows(file, **how):
        try:
            if isinstance(row, ValueError):
                raise row
            build = parse if isinstance(row, bytes) else document
            yield build(row, f"{file}:{number}")
        except ValueError as error:
            yield BadRow(str(file), number, str(error))


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
        if _says_something(row.get(key)):
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
    found = form.build(row, where)
    if any("\0" in text for text in found.texts()):
        raise ValueError("a text holds a NUL character")
    try:
        found.content().encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
    others = _unread(row, {*form.needs, *form.reads})
    return dataclasses.replace(found, unread=(*found.unread, *others)) if others else found


def _says_something(value) -> bool:
    """False for what fills the columns of a table in rows that have no such key."""
    return value is not None and value != "" and value != [] and value != {}


def _unread(row: dict, known, prefix: str = "") -> list[str]:
    """The keys that say something and are not `known`; those that may be a text under one name."""
    others = [key for key in row.keys() - known if _says_something(row[key])]
    return sorted({prefix + (key if NAME.fullmatch(key) else "(no name)") for key in others})


def _deeper(value, levels: int) -> bool:
    if levels == 0:
        return True
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_deeper(each, levels - 1) for each in inside if isinstance(each, (dict, list)))


def _text(row: dict, key: str, *, empty: bool = False) -> str:
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    if not value.strip() and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


def _json(text: str, what: str):
    """JSON inside a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not JSON") from None
    if _deeper(value, MAX_DEPTH):
        raise ValueError(f"{what} is nested too deeply")
    return value


# ---------------------------------------------------------------- conversations
SYSTEM = ("system", "system_prompt")  # keys of a row
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call in JSON
SENDERS = ("system", "developer", "user", "assistant", "tool", *CALLS)  # after ROLES
TEXT_PARTS = ("text", "input_text", "output_text")
# Whether a message is trained, as OpenAI, Mistral, axolotl and ms-swift write it: 0, 1, false or
# true.
LOSS = frozenset({"weight", "train", "training", "loss", "loss_scale", "loss_mask"})
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields that hold a reply's thought
MESSAGE = LOSS | {"role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS}


def _conversation(row: dict, where: str, messages: list, prompt: list = ()) -> Document:
    """A conversation, with the system prompt and the tools of its row.

    The messages of `prompt` come first and are not trained.
    """
    turns = _turns(prompt, 0)
    given = len(turns)
    turns += _turns(messages, len(prompt))
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


def _turns(messages: list, first: int) -> list[dict]:
    """Messages as chat templates take them, the first of which has the number `first`.

    A call in a message of its own becomes part of the reply before it, as ms-swift shows it.
    """
    turns = []
    for i, message in enumerate(messages, first):
        if isinstance(message, dict) and set(message) == {"human", "assistant"}:  # ms-swift
            turns += [
                _turn(i, {"role": "user", "content": message["human"]}),
                _turn(i, {"role": "assistant", "content": message["assistant"]}),
            ]
            continue
        turn = _turn(i, message)
        if turn["role"] in CALLS:
            turn = _call(i, turn)
            if turns and _joins(turns[-1], turn):
                before = turns.pop()
                calls = [*(before.get("tool_calls") or ()), *turn["tool_calls"]]
                turn = before | turn | {"content": before.get("content") or "", "tool_calls": calls}
        turns.append(turn)
    return turns


def _joins(before: dict, call: dict) -> bool:
    alike = all(before.get(key) == call.get(key) for key in LOSS)
    return before["role"] == "assistant" and alike


def _turn(i: int, message) -> dict:
    shared = isinstance(message, dict) and "from" in message and "role" not in message
    if shared:  # ShareGPT
        renamed = {"role": message["from"], "content": message.get("value")}
        message = renamed | {k: v for k, v in message.items() if k not in ("from", "value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {i} has no role")
    role, content = ROLES.get(message["role"], message["role"]), message.get("content")
    calls = message.get("tool_calls")
    named = f" ({role})" if NAME.fullmatch(role) else ""
    if shared and role not in SENDERS:
        raise ValueError(f"message {i}{named} is from none of human, gpt, {', '.join(SENDERS)}")
    if isinstance(content, list):
        content = "".join(_part(i, part) for part in content)
    if not (calls is None or isinstance(calls, list) and all(map(_names_a_tool, calls))):
        raise ValueError(
            f"message {i}{named}: 'tool_calls' is not a list of calls, each with the name of a function"
        )
    for key in THOUGHTS:
        if not isinstance(message.get(key), str | None):
            raise ValueError(f"message {i}{named}: {key!r} is no text")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"message {i}{named} has no text as its content")
    for key in message.keys() & LOSS:
        if message[key] not in (None, 0, 1):
            raise ValueError(f"message {i}{named}: {key!r} is neither 0 nor 1")
    if role == message["role"] and content is message.get("content"):
        return message
    return message | {"role": role, "content": content}


def _names_a_tool(call) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _part(i: int, part) -> str:
    kind, text = (
        (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("", None)
    )
    if kind in TEXT_PARTS and isinstance(text, str):
        return text
    named = f" ({kind})" if isinstance(kind, str) and NAME.fullmatch(kind) else ""
    raise ValueError(f"message {i}: a part of its content{named} is no text; {MEDIA}")


def _call(i: int, turn: dict) -> dict:
    where = f"message {i} ({turn['role']})"
    calls, made = _json(turn.get("content") or "", where), []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"{where} is no call: a JSON object with name and arguments")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}: 'arguments'")
        made.append(
            {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        )
    return turn | {"role": "assistant", "content": "", "tool_calls": made}


def _system(row: dict) -> str:
    found = {text for key in SYSTEM if (text := _text(row, key, empty=True)).strip()}
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(repr, SYSTEM))} are two system prompts")
    return found.pop() if found else ""


def _tools(row: dict) -> tuple[dict, ...]:
    tools = row.get("tools") or []
    tools = _json(tools, "'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is no list of tools (objects, or their JSON)")
    return tuple(tools)


# ---------------------------------------------------------------- forms
def _of_messages(key: str):
    def build(row, where):
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{key!r} is not a list of messages, or is empty")
        return _conversation(row, where, row[key])

    return build


def _query(row, where):
    return _replies(row, where, _text(row, "query"), _text(row, "response"))


def _instruction(row, where):
    parts = (_text(row, "instruction"), _text(row, "input", empty=True))
    return _replies(row, where, "\n".join(part for part in parts if part), _text(row, "output"))


def _replies(row, where, query: str, response: str) -> Document:
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
            for role, text in zip(("user", "assistant"), pair)
        ],
    )


def _prompt(row, where):
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(row, where, completion, prompt)
    if _system(row) or _tools(row):  # which exist in conversations alone
        return _conversation(
            row,
            where,
            [{"role": "assistant", "content": _text(row, "completion")}],
            [{"role": "user", "content": _text(row, "prompt")}],
        )
    return Document(where, prompt=_text(row, "prompt", empty=True), text=_text(row, "completion"))


def _plain(row, where):
    return Document(where, text=_text(row, "text"))


@dataclasses.dataclass(frozen=True)
class Form:
    """A row with every key of `needs` is read by `build`, which may read those of `reads` too."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    build: Callable[[dict, str], Document]


FORMS = (  # the first whose keys a row has
    Form(("messages",), (*SYSTEM, "tools"), _of_messages("messages")),
    Form(("conversations",), (*SYSTEM, "tools"), _of_messages("conversations")),
    Form(("conversation",), (*SYSTEM, "tools"), _of_messages("conversation")),
    Form(("query", "response"), ("history", *SYSTEM, "tools"), _query),
    Form(("instruction", "output"), ("input", "history", *SYSTEM, "tools"), _instruction),
    Form(("prompt", "completion"), (*SYSTEM, "tools"), _prompt),
    Form(("text",), (), _plain),
)
PAIRS = (
    "a row of preferences, which need a preference objective; to train the better answer alone, "
    "give it as a reply or completion"
)
MEDIA = "models of text alone are trained"
REFUSED = {  # keys that change what is to be learned from a row
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
