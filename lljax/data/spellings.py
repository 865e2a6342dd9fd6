"""Spellings of a conversation: variants of its tool calls that chat templates expect."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence

from lljax.data.marks import with_functions
from lljax.data.messages import THOUGHTS


def spellings(messages: Sequence[dict]) -> Iterator[list[dict]]:
    """The messages as they are, then variants of their tool calls that templates expect: arguments
    as objects or as text, an empty content as missing, null or "".
    """
    given = [
        _with_thought({key: value for key, value in message.items() if value is not None})
        for message in messages
    ]
    yield given
    calling = [i for i, message in enumerate(given) if message.get("tool_calls")]
    for kind, content in itertools.product((None, dict, str), ((), (None,), ("",))):
        spelled = list(given)
        for i in calling:
            change = functools.partial(_with_arguments, kind=kind)
            spelled[i] = with_functions(given[i], change)
            if content and not given[i].get("content"):
                spelled[i] = spelled[i] | {"content": content[0]}
        if spelled != given:
            yield spelled


def _with_thought(message: dict) -> dict:
    """The message with its thought under both names that templates read, as in transformers."""
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    if thought is None:
        return message
    return {"thinking": thought} | message | {"reasoning_content": thought}


def _with_arguments(function: dict, kind: type | None) -> dict:
    """The function of a tool call with its arguments as an object (dict) or as text (str)."""
    arguments = function.get("arguments")
    if kind is str and isinstance(arguments, dict):
        return function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if kind is dict and isinstance(arguments, str):
        try:
            return function | {"arguments": json.loads(arguments)}
        except (ValueError, RecursionError):  # models do not always write JSON
            return function
    return function
