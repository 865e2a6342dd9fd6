"""Prompts that a policy answers itself, with the columns that reward functions read."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from lljax.data.formats import (
    SYSTEM,
    TURNS,
    asked,
    check_texts,
    checked,
    instruction_of,
    is_filled,
    messages_of,
    system_of,
    text_of,
    tools_of,
    unread_in,
    with_system,
)
from lljax.data.messages import LOSS, MESSAGE, normalized
from lljax.data.prompt_tokens import chat_tokens, text_tokens
from lljax.data.render import TemplateRefusal
from lljax.data.token_store import Encoded, TokenStore
from lljax.errors import ConfigError

OVERLONG = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: `messages`, or plain `text`.

    columns: the other keys of the row, for reward functions.
    """

    where: str  # "file:line"
    columns: dict[str, Any]
    messages: tuple[dict, ...] = ()
    text: str = ""
    tools: tuple[dict, ...] = ()  # in the form of chat templates
    unread: tuple[str, ...] = ()  # keys of the row that no reader knows

    def texts(self) -> list[str]:
        return [self.text, *(message.get("content") or "" for message in self.messages)]

    def content(self) -> str:
        """The prompt in a canonical form, without the columns: it is in one part of the data only,
        however often it is there.
        """
        return json.dumps(
            [self.messages, self.text, self.tools], sort_keys=True, ensure_ascii=False
        )


# ---------------------------------------------------------------- rows
def parse_prompt(row: Any, where: str) -> Prompt:
    """The prompt of a decoded row. Raises ValueError with the reason if it has none."""
    row = checked(row)
    found = next(((key, read) for key, read in PROMPTS.items() if row.get(key) is not None), None)
    if found is None:
        raise ValueError(
            "no prompt; a row has prompt, messages, conversations, query, question or instruction, "
            "and columns for the reward functions"
        )
    key, read = found
    if key != "prompt" and is_filled(row.get("prompt")):
        raise ValueError(f"'prompt' and {key!r} are two prompts")
    prompt, used = read(row, key)
    columns = {name: value for name, value in row.items() if name not in {*used, *SYSTEM}}
    if isinstance(prompt, str):
        parsed = Prompt(where, columns, text=prompt)
    else:
        parsed = _conversation(row, where, with_system(row, prompt), columns, key in TURNS)
    check_texts(parsed.texts(), json.dumps([parsed.content(), columns], ensure_ascii=False))
    return parsed


def _conversation(
    row: dict, where: str, turns: list[dict], columns: dict, may_be_answered: bool
) -> Prompt:
    """A prompt of messages.

    may_be_answered: a reply at the end is no part of the prompt, as in ms-swift; it becomes the
      column `solution`, unless the row has one.
    """
    unread = {name for turn in turns for name in unread_in(turn, MESSAGE - LOSS, "messages.")}
    if may_be_answered and turns[-1]["role"] == "assistant":
        if is_filled(columns.get("solution")):
            unread.add("messages (the reply at the end)")
        else:
            columns = columns | {"solution": turns[-1].get("content")}
        turns = turns[:-1]
    if not turns or turns[-1]["role"] == "assistant":
        raise ValueError("the prompt is empty, or ends with a reply")
    return Prompt(
        where,
        columns,
        messages=tuple(turns),
        tools=tools_of(row),
        unread=tuple(sorted(unread)),
    )


def _prompt(row: dict, key: str) -> tuple[str | list[dict], set[str]]:
    value = row[key]
    if isinstance(value, list):
        return _turns(row, key)
    text = text_of(row, key)
    as_chat = system_of(row) or tools_of(row)  # only conversations have them
    return ([{"role": "user", "content": text}] if as_chat else text), {key}


def _turns(row: dict, key: str) -> tuple[list[dict], set[str]]:
    return normalized(messages_of(row, key), 0), {key}


def _query(row: dict, key: str) -> tuple[list[dict], set[str]]:
    return normalized(asked(row, text_of(row, key)), 0), {key, "history"}


def _instruction(row: dict, key: str) -> tuple[list[dict], set[str]]:
    turns = normalized(asked(row, instruction_of(row)), 0)
    return turns, {key, "input", "history"}


# The first key that a row has -> the prompt, and the keys that it is read from.
PROMPTS: dict[str, Callable[[dict, str], tuple[str | list[dict], set[str]]]] = {
    **dict.fromkeys(TURNS, _turns),
    "prompt": _prompt,
    "query": _query,
    "question": _query,
    "instruction": _instruction,
}


# ---------------------------------------------------------------- tokens
def encode_prompt(prompt: Prompt, tokenizer: Any, loss_on: str) -> Encoded:
    """The tokens of a prompt as generation reads it; none of them is trained.

    loss_on: not used; there is no loss on a prompt.

    Raises:
      ValueError: the chat template refuses the conversation, or nothing is left of it.
      ModelError: the template does not end, or exceeds its memory.
    """
    try:
        ids = (
            chat_tokens(tokenizer, prompt.messages, tools=prompt.tools)
            if prompt.messages
            else text_tokens(tokenizer, prompt.text)
        )
    except TemplateRefusal as error:  # its message may hold a user's text
        raise ValueError(f"the chat template refuses it ({error.kind})") from None
    if not ids:
        raise ValueError("the prompt has no tokens")
    shown = list(prompt.messages) if prompt.messages else prompt.text
    row = prompt.columns | {"prompt": shown}
    return Encoded(np.asarray(ids, np.uint32), np.zeros(len(ids), bool), row=row)


def middle_cut(n: int, kept: int) -> np.ndarray:
    """The indices [kept] of n tokens that stay when the middle is left out: the system prompt is at
    the start, and the question at the end.
    """
    if n <= kept:
        return np.arange(n)
    first = kept // 2
    return np.concatenate([np.arange(first), np.arange(n - kept + first, n)])


class PromptPieces:
    """Prompts of at most T tokens, each {"tokens": int32 [n], "document": its number in the store};
    a random-access source for grain.

    overlong: longer prompts are left out ("drop"), or lose their middle ("truncate").

    Raises:
      ConfigError: another value of `overlong`.
    """

    def __init__(self, store: TokenStore, T: int, overlong: str):
        check_overlong(overlong, "prompts")
        self.store, self.T = store, T
        fits = store.lengths <= T
        self.document = np.flatnonzero(fits) if overlong == "drop" else np.arange(len(store))
        self._truncated = int((~fits).sum()) if overlong == "truncate" else 0

    def counts(self) -> dict[str, int]:
        """The numbers of `documents`, of documents `dropped` or `truncated` for their length, of
        `pieces`, and of `tokens` in them.
        """
        return {
            "documents": len(self),
            "dropped": len(self.store) - len(self),
            "truncated": self._truncated,
            "untrained": 0,
            "pieces": len(self),
            "tokens": int(np.minimum(self.store.lengths[self.document], self.T).sum()),
        }

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, i: int) -> dict[str, Any]:
        document = int(self.document[i])
        tokens = self.store.tokens(document)
        kept = tokens[middle_cut(len(tokens), self.T)]
        return {"tokens": kept.astype(np.int32), "document": document}

    def __repr__(self) -> str:  # grain names the source of an iterator state by it
        return f"PromptPieces({len(self)} of {self.T})"


def check_overlong(overlong: str, rows: str) -> None:
    """Raises ConfigError if rows that are never split were to be."""
    if overlong not in OVERLONG:
        raise ConfigError(
            f"data.overlong={overlong!r}: {rows} are never split: use "
            f"{' or '.join(map(repr, OVERLONG))}"
        )
