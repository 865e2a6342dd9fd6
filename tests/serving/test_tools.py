"""Calls of tools are found in a reply, however it is cut into pieces."""

import json

import pytest

from lljax.serving.tools import FORMS, ToolReader, form_of

ADD = '{"name": "add", "arguments": {"a": 1}}'
CASES = {
    "a call": ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", "", ["add"]),
    "text before": ("hermes", f"I add.\n<tool_call>{ADD}</tool_call>", "I add.\n", ["add"]),
    "two": (
        "hermes",
        f"<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>",
        "",
        ["add"] * 2,
    ),
    "text after": ("hermes", f"<tool_call>{ADD}</tool_call> so", "so", ["add"]),
    "no end": ("hermes", f"<tool_call>{ADD}", "", ["add"]),
    "none": ("hermes", "a < b <tool", "a < b <tool", []),
    "broken": ("hermes", "x<tool_call>{add}</tool_call>", "x<tool_call>{add}</tool_call>", []),
    "no name": ("hermes", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    "llama": ("llama3_json", '{"name": "add", "parameters": {"a": 1}}', "", ["add"]),
    "llama, two": ("llama3_json", f"{ADD}; {ADD}", "", ["add"] * 2),
    "llama, tag": ("llama3_json", f"<|python_tag|>{ADD}", "", ["add"]),
    "llama, text": ("llama3_json", 'so {"name": "add"}', 'so {"name": "add"}', []),
    "llama, other JSON": ("llama3_json", '{"answer": 1}', '{"answer": 1}', []),
}


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("form,text,content,names", CASES.values(), ids=CASES)
def test_calls_and_content_are_separated(form, text, content, names, step):
    reader = ToolReader(FORMS[form])
    shown = "".join(reader.add(text[i : i + step]) for i in range(0, len(text), step))
    shown += reader.finish()
    assert shown == content
    assert [call["function"]["name"] for call in reader.calls] == names
    for call in reader.calls:
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        assert call["type"] == "function" and call["id"].startswith("call_")


def test_content_is_shown_as_soon_as_it_is_certain():
    reader = ToolReader(FORMS["hermes"])
    assert reader.add("a < b") == "a < b" and reader.add(" <tool") == " "
    assert reader.add("box") == "<toolbox"


def test_the_template_tells_the_form():
    assert form_of("... <tool_call> ...") is FORMS["hermes"]
    assert form_of("... <|python_tag|> ...") is FORMS["llama3_json"]
    assert form_of("{{ messages }}") is None and form_of(None) is None
