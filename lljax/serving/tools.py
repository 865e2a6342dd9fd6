"""Calls of tools in the text of a reply: a table of the forms that models write."""

import dataclasses
import json
import uuid
from collections.abc import Callable
from typing import Any

JSON_START, JSON_END = "<tool_call>", "</tool_call>"


@dataclasses.dataclass(frozen=True)
class Form:
    """How a family of models writes calls.

    marks: strings of a chat template that teaches this form, any of which shows it.
    opens: strings that begin a call in a reply.
    anywhere: a call may follow text; otherwise it begins the reply.
    parse: the (name, arguments) of all calls in a text that begins with a call, and the rest of the
      text; raises ValueError if there is none.
    """

    marks: tuple[str, ...]
    opens: tuple[str, ...]
    anywhere: bool
    parse: Callable[[str], tuple[list[tuple[str, Any]], str]]


def _hermes(text: str) -> tuple[list[tuple[str, Any]], str]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of times."""
    calls, text = [], text.lstrip()
    while text.startswith(JSON_START):
        inside, _, text = text.removeprefix(JSON_START).partition(JSON_END)
        calls.append(_named(json.loads(inside)))
        text = text.lstrip()
    return calls, text


def _llama(text: str) -> tuple[list[tuple[str, Any]], str]:
    """{"name": ..., "parameters": {...}}, separated by semicolons."""
    calls, decoder = [], json.JSONDecoder()
    text = text.strip().removeprefix("<|python_tag|>").lstrip()
    while text.startswith("{"):
        call, end = decoder.raw_decode(text)
        calls.append(_named(call))
        text = text[end:].lstrip(" ;\n")
    return calls, text


FORMS = {
    "hermes": Form(marks=(JSON_START,), opens=(JSON_START,), anywhere=True, parse=_hermes),
    "llama3_json": Form(
        marks=("<|python_tag|>", '{"name": function name'),
        opens=("{", "<|python_tag|>"),
        anywhere=False,
        parse=_llama,
    ),
}


def form_of(template: Any) -> Form | None:
    """The form that a chat template teaches; None if it teaches none of the table."""
    text = str(template)
    return next((form for form in FORMS.values() if any(mark in text for mark in form.marks)), None)


def _named(call: Any) -> tuple[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("no call")
    return call["name"], call.get("arguments", call.get("parameters", {}))


class ToolReader:
    """Separates calls from content in the text of a reply, as it grows."""

    def __init__(self, form: Form):
        self._form = form
        self._held = ""  # may be a call, or its beginning
        self._calling = False
        self._begun = False
        self.calls: list[dict] = []

    def add(self, text: str) -> str:
        """More text of the reply; returns the part that is certainly content."""
        self._held += text
        if self._calling:
            return ""
        if not self._form.anywhere:
            return self._at_the_start()
        places = [place for place in map(self._held.find, self._form.opens) if place >= 0]
        if places:
            self._calling = True
            return self._release(min(places))
        return self._release(len(self._held) - self._partial())

    def finish(self) -> str:
        """Reads the calls at the end of the reply; returns the rest of the content. A call that
        cannot be read is content.
        """
        try:
            calls, rest = self._form.parse(self._held) if self._calling else ([], self._held)
        except (ValueError, RecursionError):
            calls, rest = [], self._held
        self.calls = [_body(name, arguments) for name, arguments in calls]
        self._held = ""
        return rest

    def _at_the_start(self) -> str:
        if self._begun:
            return self._release(len(self._held))
        start = self._held.lstrip()
        if any(start.startswith(text) for text in self._form.opens):
            self._calling = True
            return ""
        if any(text.startswith(start) for text in self._form.opens):
            return ""
        self._begun = True
        return self._release(len(self._held))

    def _partial(self) -> int:
        """Characters at the end that may begin a call."""
        return max(
            (
                n
                for text in self._form.opens
                for n in range(1, len(text))
                if self._held.endswith(text[:n])
            ),
            default=0,
        )

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def _body(name: str, arguments: Any) -> dict:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }
