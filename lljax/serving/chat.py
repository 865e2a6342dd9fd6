"""Chat messages of a request -> the text of the prompt, by the model's chat template."""

import json
from collections.abc import Sequence
from typing import Any

from lljax.data.render import chat_text
from lljax.errors import ModelError, short
from lljax.serving.errors import ApiError, wrong

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
TEXTS = ("name", "tool_call_id", "reasoning_content", "refusal")  # fields that hold a string


def prompt_text(tokenizer: Any, values: dict[str, Any]) -> str:
    """The conversation of a request, up to where the reply begins.

    values: of the fields of a chat request.

    Raises:
      ApiError: a message or tool is malformed, the model has no chat template, or the template
        refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise wrong(
            "messages",
            "the model has no chat template: use /v1/completions, or start the server with "
            "--chat_template=FILE, or --chat_template=plain for lljax's own",
            "no_chat_template",
        )
    messages = [_message(i, message) for i, message in enumerate(values["messages"])]
    options = dict(values["chat_template_kwargs"])
    if values["reasoning_effort"] is not None:
        options.setdefault("reasoning_effort", values["reasoning_effort"])
    if tools := used_tools(values):
        options["tools"] = [_tool(i, tool) for i, tool in enumerate(tools)]
    try:
        return chat_text(tokenizer, messages, **options)
    except ModelError as error:
        raise wrong("messages", str(error), "chat_template_failed") from None


def used_tools(values: dict[str, Any]) -> list[dict]:
    """The tools that the reply may call."""
    return values["tools"] if values["tool_choice"] == "auto" else []


def _message(i: int, message: dict) -> dict:
    """Message i as chat templates take it: its content is a string, arguments are objects."""
    at = f"messages[{i}]"
    role = message.get("role")
    if role not in ROLES:
        raise wrong(f"{at}.role", f"must be one of {', '.join(ROLES)}, not {short(role)}")
    for name in TEXTS:
        if not isinstance(message.get(name), str | None):
            raise wrong(f"{at}.{name}", f"must be a string, not {short(message[name])}")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise wrong(f"{at}.tool_calls", f"must be a list, not {short(calls)}")
    turn = {name: value for name, value in message.items() if value is not None}
    turn["content"] = _content(f"{at}.content", message.get("content"), bool(calls))
    if calls:
        turn["tool_calls"] = [_call(f"{at}.tool_calls[{n}]", call) for n, call in enumerate(calls)]
    else:
        turn.pop("tool_calls", None)
    return turn


def _content(at: str, content: Any, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list):
        return "".join(_part(f"{at}[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(at, f"must be a string or a list of text parts, not {short(content)}")
    return content


def _part(at: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        raise wrong(at, f"must be of type 'text': lljax serves models of text, not {short(kind)}")
    if not isinstance(part.get("text"), str):
        raise wrong(at, "its text must be a string")
    return part["text"]


def _call(at: str, call: Any) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(at, "must be an object whose function has a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI sends them; templates write objects
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise wrong(f"{at}.function.arguments", "must be JSON") from None
    return call | {"type": "function", "function": function | {"arguments": arguments}}


def _tool(i: int, tool: dict) -> dict:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise wrong(f"tools[{i}]", "must have the type 'function' and a function")
    if not isinstance(function.get("name"), str):
        raise wrong(f"tools[{i}].function.name", "must be a string")
    if not isinstance(function.get("parameters", {}), dict):
        raise wrong(f"tools[{i}].function.parameters", "must be a JSON schema")
    return tool


def text_ids(tokenizer: Any, text: str, before: Sequence[int] = ()) -> list[int]:
    """The tokens of a text after the tokens `before`.

    Raises:
      ApiError: the tokenizer fails on the text.
    """
    try:
        return [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by Rust, and no Exception
            raise
        raise ApiError(400, "the tokenizer fails on the text of the prompt") from None
