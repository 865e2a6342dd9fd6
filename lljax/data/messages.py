"""Messages of many formats as chat templates take them: OpenAI, ShareGPT, ms-swift."""

import json
import re
from collections.abc import Sequence
from typing import Any, cast

# The name of a field or role; anything else in its place may be a user's text.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
MAX_DEPTH = 64  # of nested lists and objects; JSON schemas of tools need 20
MEDIA = "models of text alone are trained"
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose content is a tool call in JSON
SENDERS = ("system", "developer", "user", "assistant", "tool", *CALLS)  # after ROLES
TEXT_PARTS = ("text", "input_text", "output_text")
# Whether a message is trained: the fields of OpenAI, Mistral, axolotl and ms-swift, with the values
# 0, 1, false or true.
LOSS = frozenset({"weight", "train", "training", "loss", "loss_scale", "loss_mask"})
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields of a reply's thought
MESSAGE = LOSS | {"role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS}


def normalized(messages: Sequence, first: int) -> list[dict]:
    """Messages as chat templates take them; `first` is the number of the first message, for errors.

    A tool call in a separate message becomes part of the reply before it, as in ms-swift.

    Raises:
      ValueError: a message is of no known form.
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
    same_loss = all(before.get(key) == call.get(key) for key in LOSS)
    return before["role"] == "assistant" and same_loss


def _turn(i: int, message: Any) -> dict:
    """Message i with role and content as chat templates take them."""
    shared = isinstance(message, dict) and "from" in message and "role" not in message
    if shared:  # ShareGPT
        renamed = {"role": message["from"], "content": message.get("value")}
        message = renamed | {k: v for k, v in message.items() if k not in ("from", "value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {i} has no role")
    role = cast(str, ROLES.get(message["role"], message["role"]))
    content = message.get("content")
    calls = message.get("tool_calls")
    named = f" ({role})" if NAME.fullmatch(role) else ""
    if shared and role not in SENDERS:
        raise ValueError(f"message {i}{named} is from none of human, gpt, {', '.join(SENDERS)}")
    if isinstance(content, list):
        content = "".join(_part(i, part) for part in content)
    if not (calls is None or isinstance(calls, list) and all(map(_names_a_tool, calls))):
        raise ValueError(
            f"message {i}{named}: 'tool_calls' is not a list of calls, each with the name of a "
            "function"
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


def _names_a_tool(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _part(i: int, part: Any) -> str:
    """The text of a part of a content."""
    fields = part if isinstance(part, dict) else {"type": ""}
    kind, text = fields.get("type", "text"), fields.get("text")
    if kind in TEXT_PARTS and isinstance(text, str):
        return text
    named = f" ({kind})" if isinstance(kind, str) and NAME.fullmatch(kind) else ""
    raise ValueError(f"message {i}: a part of its content{named} is no text; {MEDIA}")


def _call(i: int, turn: dict) -> dict:
    """A message whose content is tool calls in JSON, as a reply with `tool_calls`."""
    where = f"message {i} ({turn['role']})"
    calls, functions = parse_json(turn.get("content") or "", where), []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"{where} is no call: a JSON object with name and arguments")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: 'arguments'")
        functions.append({"name": call["name"], "arguments": arguments})
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return turn | {"role": "assistant", "content": "", "tool_calls": tool_calls}


def parse_json(text: str, name: str) -> Any:
    """JSON inside a text. name: of the text, for errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not JSON") from None
    if deeper(value, MAX_DEPTH):
        raise ValueError(f"{name} is nested too deeply")
    return value


def deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than `levels` levels."""
    if levels == 0:
        return True
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(deeper(item, levels - 1) for item in inside if isinstance(item, (dict, list)))
