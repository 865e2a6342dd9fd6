"""Placeholders ("marks") for the texts of a conversation.

Templates trim contents, escape them, and search them for tags. A mark is a word of letters and
digits, which stays intact; the white space around a text and the tags in it stay in place.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from lljax.data.messages import THOUGHTS

# Tags that templates search for: <think>, [THINK], <seed:think>, <tool_response>, /no_think.
TAG = re.compile(
    r"([<\[◁]/?[\w:|]{0,20}(?:think|tool)\w{0,20}[>\]▷]"
    r"|/(?:no_?)?think\b|detailed thinking (?:on|off))",
    re.IGNORECASE,
)
ENDS_THOUGHT = re.compile(r"[<\[◁]/[\w:|]{0,20}think\w{0,20}[>\]▷]", re.IGNORECASE)


@dataclasses.dataclass(eq=False)
class Mark:
    """A hidden text.

    message: index of its message, -1 for tools. kind: content, thought, call, arguments (of a call,
    as text) or tool. space: the white space after it. shown: the template shows it.
    """

    message: int
    kind: str
    text: str
    space: str = ""
    shown: bool = False

    def as_shown(self) -> Iterator[str]:
        """The spellings of templates: the text itself, and as JSON, encoded once or twice."""
        yield self.text
        once = json.dumps(self.text, ensure_ascii=False)[1:-1]
        yield once
        yield json.dumps(self.text)[1:-1]
        yield json.dumps(once, ensure_ascii=False)[1:-1]


class Marker:
    """Replaces texts by marks that do not occur in `text`, and finds the marks in a rendering."""

    def __init__(self, text: str):
        stems = (f"Mq{k}x" for k in itertools.count())
        self.stem = next(stem for stem in stems if stem not in text)
        self.marks: list[Mark] = []

    # ---------------------------------------------------------------- hiding
    def message(self, i: int, message: dict) -> dict:
        """Message i with its content, thought and tool calls hidden."""
        hidden = dict(message)
        thoughts = [name for name in THOUGHTS if isinstance(message.get(name), str)]
        if thoughts:
            thought = self._hide(i, "thought", message[thoughts[0]])
            hidden |= dict.fromkeys(thoughts, thought)
        if isinstance(message.get("content"), str):
            hidden["content"] = self._content(i, message)
        return with_functions(hidden, lambda function: self._function(i, function))

    def tool(self, tool: dict) -> dict:
        """A tool's description with the name hidden."""

        def hide_name(function: dict) -> dict:
            if not isinstance(function.get("name"), str):
                return function
            return function | {"name": self._hide(-1, "tool", function["name"])}

        return with_functions({"tool_calls": [tool]}, hide_name)["tool_calls"][0]

    def _hide(self, message: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, space = text.partition(core)
        self.marks.append(Mark(message, kind, core, space))
        return f"{before}{self.stem}{len(self.marks) - 1}z{space}"

    def _content(self, i: int, message: dict) -> str:
        parts, thought = TAG.split(message["content"]), 0  # tags have odd indices
        if message["role"] == "assistant":
            ends = [n for n, part in enumerate(parts) if n % 2 and ENDS_THOUGHT.fullmatch(part)]
            thought = max(ends, default=0)
        for n in range(0, len(parts), 2):
            parts[n] = self._hide(i, "thought" if n < thought else "content", parts[n])
        return "".join(parts)

    def _function(self, i: int, function: dict) -> dict:
        name, arguments, hidden = function.get("name"), function.get("arguments"), {}
        if isinstance(name, str):
            hidden["name"] = self._hide(i, "call", name)
        if isinstance(arguments, str):
            hidden["arguments"] = self._hide(i, "arguments", arguments)
        elif arguments is not None:
            hidden["arguments"] = self._leaves(i, arguments)
        return function | hidden

    def _leaves(self, i: int, value: Any) -> Any:
        """A JSON value with all strings hidden."""
        if isinstance(value, dict):
            return {key: self._leaves(i, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(i, item) for item in value]
        return self._hide(i, "call", value) if isinstance(value, str) else value

    # ---------------------------------------------------------------- finding
    def split(self, rendering: str) -> tuple[list[str], list[Mark]]:
        """The text before, between and after the marks, and the marks."""
        parts = re.split(self.stem + r"(\d+)z", rendering)
        return parts[::2], [self.marks[int(number)] for number in parts[1::2]]

    def after_marks(self, rendering: str) -> str:
        """The text after the first occurrence of every mark; repeated marks become their text."""
        between, marks = self.split(rendering)
        first = {mark: n for n, mark in reversed(list(enumerate(marks)))}
        last = max(first.values(), default=-1)
        repeated = zip(marks[last + 1 :], between[last + 2 :], strict=True)
        return between[last + 1] + "".join(mark.text + then for mark, then in repeated)


def with_functions(message: dict, change: Callable[[dict], dict]) -> dict:
    """The message with `change` applied to the function of every tool call.

    Raises:
      ValueError: tool_calls is not a list of calls.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls is not a list of calls")
    nested = [isinstance(call.get("function"), dict) for call in calls]
    return message | {
        "tool_calls": [
            call | {"function": change(call["function"])} if inner else change(call)
            for call, inner in zip(calls, nested, strict=True)
        ]
    }
