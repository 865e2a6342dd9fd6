"""The fields of a request's body: a table of names, checks and defaults.

A field that lljax does not implement is accepted with the value that changes nothing, see
`NEUTRAL`; any other field is refused by name.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from typing import Any

from lljax.errors import short
from lljax.generation.programs import MOST_LIKELY
from lljax.serving.errors import wrong

MOST_TOKENS = 2**31 - 1
MOST_CHOICES = 128  # `n`
MOST_STOPS, LONGEST_STOP = 32, 256  # strings, and characters in each
MOST_MESSAGES = 10_000
MOST_TOOLS = 256
# The template's own variables, which chat_template_kwargs must not replace.
RESERVED = {
    *("messages", "tools", "documents", "chat_template", "conversations", "conversation"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
}

Check = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """check: returns the value to use, or raises ValueError with what is allowed. default: the
    value if the field is missing or null.
    """

    check: Check
    default: Any = None


# ---------------------------------------------------------------- checks
def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        good = type(value) in (int, float) and low <= value <= high and math.isfinite(value)
        return float(value) if good else _refuse(f"a number from {low:g} to {high:g}")

    return check


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        good = whole and low <= value <= high
        return int(value) if good else _refuse(f"a whole number from {low} to {high}")

    return check


def boolean(value: Any) -> bool:
    return value if type(value) is bool else _refuse("true or false")


def string(value: Any) -> str:
    return value if isinstance(value, str) else _refuse("a string")


def model_name(value: Any) -> str:
    """The name of an adapter, which error messages and metrics show."""
    good = isinstance(value, str) and re.fullmatch(r"[\w.:/@+-][\w.:/@+ -]{0,199}", value)
    return value if good else _refuse("a name of up to 200 letters, digits and . : / @ + - _")


def share(value: Any) -> float:
    """top_p: above 0, since no token at all would be left."""
    return number(0, 1)(value) or _refuse("a number above 0 and at most 1")


def listed(most: int, item: type) -> Check:
    """A list of at most `most` values of a type."""
    names = {dict: "objects", str: "strings", int: "whole numbers"}

    def check(value: Any) -> list:
        good = (
            isinstance(value, list) and len(value) <= most and all(type(x) is item for x in value)
        )
        return value if good else _refuse(f"a list of at most {most} {names[item]}")

    return check


def stops(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else listed(MOST_STOPS, str)(value)
    if not all(1 <= len(text) <= LONGEST_STOP for text in strings):
        _refuse(f"strings of 1 to {LONGEST_STOP} characters")
    return tuple(strings)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse("an object")


def template_options(value: Any) -> dict[str, Any]:
    if reserved := RESERVED & set(mapping(value)):
        _refuse(f"an object without {', '.join(sorted(reserved))}")
    return value


def stream_options(value: Any) -> dict[str, Any]:
    if unknown := set(mapping(value)) - {"include_usage", "include_obfuscation"}:
        _refuse(f"an object with include_usage alone, without {short(min(unknown))}")
    return {name: boolean(flag) for name, flag in value.items()}


def tool_choice(value: Any) -> str:
    if value not in ("none", "auto"):
        _refuse("'none' or 'auto': lljax does not force a call")
    return value


def messages(value: Any) -> list[dict]:
    return listed(MOST_MESSAGES, dict)(value) or _refuse("a list of at least one message")


def prompts(value: Any) -> list[str] | list[list[int]]:
    """A list of texts, or of lists of token ids, from any of OpenAI's four forms."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        for items in (value, [value]):
            if all(isinstance(item, str) for item in items):
                return items
            if all(isinstance(item, list) and all(type(x) is int for x in item) for item in items):
                return items
    return _refuse("a string, a list of strings, a list of token ids, or a list of such lists")


def _refuse(allowed: str) -> Any:
    raise ValueError(allowed)


# ---------------------------------------------------------------- the table
COMMON = {
    "model": Field(string),
    "temperature": Field(number(0, 100), 1.0),
    "top_p": Field(share, 1.0),
    "top_k": Field(integer(-1, MOST_TOKENS), 0),  # -1, as in vLLM, and 0: all tokens
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0.01, 100), 1.0),
    "seed": Field(integer(-(2**63), 2**63 - 1)),
    "stop": Field(stops, ()),
    "stop_token_ids": Field(listed(MOST_STOPS, int), []),
    "ignore_eos": Field(boolean, False),
    "n": Field(integer(1, MOST_CHOICES), 1),
    "stream": Field(boolean, False),
    "stream_options": Field(stream_options, {}),
    "response_format": Field(mapping),
}
CHAT = COMMON | {
    "messages": Field(messages),
    "max_tokens": Field(integer(1, MOST_TOKENS)),
    "max_completion_tokens": Field(integer(1, MOST_TOKENS)),
    "logprobs": Field(boolean, False),
    "top_logprobs": Field(integer(0, MOST_LIKELY), 0),
    "tools": Field(listed(MOST_TOOLS, dict), []),
    "tool_choice": Field(tool_choice, "auto"),
    "chat_template_kwargs": Field(template_options, {}),
    "reasoning_effort": Field(string),
}
COMPLETION = COMMON | {
    "prompt": Field(prompts),
    "max_tokens": Field(integer(0, MOST_TOKENS), 16),
    "logprobs": Field(integer(0, MOST_LIKELY)),
    "echo": Field(boolean, False),
}
LOADING = {"lora_name": Field(model_name), "lora_path": Field(string)}
UNLOADING = {"lora_name": Field(model_name), "lora_int_id": Field(integer(0, MOST_TOKENS))}
REQUIRED = {"messages", "prompt", "lora_name", "lora_path"}

# Fields of OpenAI and vLLM that lljax lacks, and their values that change nothing; an empty tuple
# if every value does.
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "service_tier": (),
    "store": (),
    "metadata": (),
    "user": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "verbosity": ("medium",),
}


def read_fields(body: dict[str, Any], table: dict[str, Field]) -> dict[str, Any]:
    """The value of every field of the table.

    Raises:
      ApiError: a value cannot be used, or a field is unknown or missing.
    """
    for name, value in body.items():
        if name not in table:
            _check_neutral(name, value, table)
    values = {}
    for name, field in table.items():
        given = body.get(name)
        if given is None:
            if name in REQUIRED:
                raise wrong(name, "the field is missing", "missing_required_parameter")
            values[name] = field.default
            continue
        try:
            values[name] = field.check(given)
        except ValueError as error:
            raise wrong(name, f"must be {error}, not {short(given)}") from None
    return values


def _check_neutral(name: str, value: Any, table: dict[str, Field]) -> None:
    if name in NEUTRAL:
        neutral = NEUTRAL[name]
        if value is None or not neutral or any(value == one for one in neutral):
            return
        raise wrong(name, f"lljax has no such option: leave it out or send {neutral[0]!r}")
    near = difflib.get_close_matches(name[:60], table, 1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise wrong(short(name).strip("'"), f"there is no such field{hint}", "unknown_parameter")
