"""A conversation keeps the latest messages, as far as they fit."""

import pytest

from lljax.data.template import PLAIN_TEMPLATE
from lljax.errors import ModelError
from lljax.generation.chat import Chat, TooLong


@pytest.fixture
def chatting(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN_TEMPLATE)
    return tokenizer


def test_a_reply_is_asked_for_after_all_that_was_said(chatting):
    chat = Chat(chatting, 500, system="Be brief.")
    chat.ask("one?")
    chat.add_reply("1.")
    shown = chatting.decode(chat.ask("two?"))
    places = [shown.index(text) for text in ("Be brief.", "one?", "1.", "two?")]
    assert places == sorted(places) and shown.endswith("### Assistant:\n") and chat.left_out == 0


def test_what_no_longer_fits_is_left_out_oldest_first_and_the_system_stays(chatting):
    chat = Chat(chatting, 200, system="Be brief.")
    for i in range(12):
        tokens = chat.ask(f"question {i}?")
        assert len(tokens) <= 200
        chat.add_reply(f"answer {i}.")
    shown = chatting.decode(tokens)
    assert (
        "Be brief." in shown
        and "question 11?" in shown
        and "answer 10." in shown
        and "question 0?" not in shown
    )
    assert (
        chat.left_out > 0
        and chat.left_out % 2 == 0
        and [m["role"] for m in chat.messages[1:3]] == ["user", "assistant"]
    )
    before = list(chat.messages)
    with pytest.raises(TooLong, match="the model reads 200 before its reply"):
        chat.ask("many words " * 100)
    assert chat.messages == before


def test_a_template_that_raises_is_one_line(chatting, monkeypatch):
    monkeypatch.setattr(
        chatting, "chat_template", "{{ raise_exception('no \\x1b[31m\n\nsystem') }}"
    )
    with pytest.raises(
        ModelError, match=r"^the chat template refuses the conversation \(.*no \\x1b\[31m\)$"
    ):
        Chat(chatting, 100).ask("hi")
