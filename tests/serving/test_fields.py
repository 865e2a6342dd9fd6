"""The table of fields: defaults, checks, and fields that lljax lacks."""

import pytest

from lljax.serving.errors import ApiError
from lljax.serving.fields import CHAT, COMPLETION, NEUTRAL, read_fields

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def test_missing_and_null_fields_have_their_defaults():
    values = read_fields(HELLO | {"temperature": None}, CHAT)
    assert set(values) == set(CHAT)
    assert (values["temperature"], values["top_p"], values["n"]) == (1.0, 1.0, 1)
    assert read_fields({"prompt": "a"}, COMPLETION)["max_tokens"] == 16


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_lljax_lacks_is_taken_with_the_value_that_changes_nothing(name):
    for value in NEUTRAL[name] or ("x", 7, {"a": 1}):
        read_fields(HELLO | {name: value}, CHAT)
    read_fields(HELLO | {name: None}, CHAT)


@pytest.mark.parametrize(
    "prompt,read",
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)
def test_a_prompt_has_four_forms(prompt, read):
    assert read_fields({"prompt": prompt}, COMPLETION)["prompt"] == read


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("temperature", "hot", "a number from 0"),
        ("temperature", True, "a number from 0"),
        ("temperature", float("inf"), "a number from 0"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.5, "from 0 to 1"),
        ("n", 0, "from 1"),
        ("n", 1.5, "whole"),
        ("seed", 2**63, "whole"),
        ("stop", "", "of 1 to"),
        ("stop", ["a"] * 10_000, "at most 32"),
        ("stop", ["a", 1], "strings"),
        ("stream_options", {"usage": True}, "include_usage alone"),
        ("tool_choice", "required", "does not force"),
        ("tool_choice", {"type": "function"}, "does not force"),
        ("messages", [], "at least one"),
        ("messages", None, "missing"),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}, "without chat_template"),
        ("presence_penalty", 0.5, "no such option"),
        ("temprature", 1, "did you mean 'temperature'"),
        ("x" * 10_000, 1, "no such field"),
        ("a\nb", 1, "no such field"),
    ],
)
def test_a_wrong_field_is_named(name, value, message):
    with pytest.raises(ApiError, match=message) as error:
        read_fields(HELLO | {name: value}, CHAT)
    assert error.value.status == 400 and len(error.value.message) < 400
    assert len(name) > 100 or "\n" in name or error.value.param == name
