"""Messages become the text of the prompt, through the model's template."""

import pytest
from serving.cases import HERMES

from lljax.serving.chat import prompt_text
from lljax.serving.errors import ApiError
from lljax.serving.fields import CHAT, read_fields

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def chatty(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = HERMES
    return tokenizer


def text_of(tokenizer, *messages, **more):
    return prompt_text(tokenizer, read_fields({"messages": list(messages)} | more, CHAT))


def test_parts_are_joined_and_options_reach_the_template(chatty):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = text_of(chatty, {"role": "user", "content": parts}, chat_template_kwargs={"shout": True})
    assert text == "user: ab<end>\nLOUD assistant: "


def test_tools_and_calls_reach_the_template(chatty):
    text = text_of(
        chatty,
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        tools=[TOOL],
    )
    assert text.startswith('<tool_call>{"type": "function"')
    assert '"arguments": {"a": 1}' in text  # an object, and not text in text
    assert "<tool_call>" not in text_of(
        chatty, {"role": "user", "content": "x"}, tools=[TOOL], tool_choice="none"
    )


@pytest.mark.parametrize(
    "message,param",
    [
        ({"role": "wizard", "content": "a"}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": ["user"], "content": "a"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": "a"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
        ({"role": "user", "content": "a", "name": 1}, "messages[0].name"),
    ],
)
def test_a_malformed_message_is_named(chatty, message, param):
    with pytest.raises(ApiError) as error:
        text_of(chatty, message)
    assert error.value.param == param and error.value.status == 400


def test_a_model_without_a_template_says_what_to_do(tokenizer):
    with pytest.raises(ApiError, match="no chat template: use /v1/completions"):
        text_of(tokenizer, {"role": "user", "content": "a"})


def test_a_template_may_refuse(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate") as error:
        text_of(strict, {"role": "user", "content": "a"})
    assert error.value.status == 400
