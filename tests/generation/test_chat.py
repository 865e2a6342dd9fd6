"""A conversation keeps what was said, as far as it fits, and the script shows it."""

import io
import sys

import pytest

from lljax.data.template import PLAIN_TEMPLATE
from lljax.errors import ModelError
from lljax.generation.chat import Chat, TooLong
from scripts import generate as script


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


def run(monkeypatch, base, *flags, said=""):
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--model={base}", "--tokens=4", *flags])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    script.main()


def test_a_conversation_goes_on_over_what_does_not_fit_until_it_is_ended(monkeypatch, capsys):
    asked, replies = [], iter(["first", "second"])
    monkeypatch.setattr(script.Writer, "model", None)
    monkeypatch.setattr(
        script.Writer,
        "write",
        lambda self, prompt: asked.append(self.tokenizer.decode(prompt)) or next(replies),
    )
    run(
        monkeypatch,
        "lljax/assets/tiny-512",
        "--chat",
        "--system=S",
        said=f"a\n\n{'long ' * 2000}\nb\n/exit\nc\n",
    )
    assert (
        len(asked) == 2
        and all(text in asked[1] for text in ("S", "a", "first", "b"))
        and "second" not in asked[1]
    )
    assert "say it in fewer words" in capsys.readouterr().err
    replies = iter(["first"])
    # the end of the input is the end as well
    run(monkeypatch, "lljax/assets/tiny-512", "--chat", said="a")


def test_what_is_shown_is_what_is_decoded_and_fits_what_the_model_reads(tiny, monkeypatch, capsys):
    run(monkeypatch, tiny, "--prompt=import os", "--tokens=1000000000000")
    shown, counted = capsys.readouterr()
    assert counted.startswith("(") and shown.endswith("\n")
    read, written = (
        int(word)
        for word in counted.strip("()\n").removesuffix(" tokens").replace(",", "").split(" + ")
    )
    assert written > 0 and read + written <= script.of_base(tiny, None).extended.max_length


def test_what_the_terminal_cannot_show_is_escaped_and_a_stop_string_ends_the_text(
    tiny, tokenizer, monkeypatch
):
    tokens = [token for c in "naïve, and more" for token in tokenizer(c)["input_ids"]]
    monkeypatch.setattr(script.Writer, "model", None)
    monkeypatch.setattr(script, "stream", lambda *_, **how: ([token] for token in tokens))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), encoding="ascii"))
    run(monkeypatch, tiny, "--prompt=a", "--stop= more")
    sys.stdout.flush()
    assert out.getvalue() == b"na\\xefve, and\n"


@pytest.mark.parametrize(
    "flags,told",
    [
        ([], "--prompt or --prompt_file, or talk with --chat"),
        (["--prompt=a", "--system=b"], "--system without --chat"),
        (["--prompt=a", "--stop="], "--stop=''"),
        (["--prompt=a", "--tokens=0"], "--tokens=0"),
        (
            ["--prompt_file=/dev/zero"],
            "/dev/zero: there is no such file, or it is not a regular one",
        ),
        (["--prompt=\udcff"], "--prompt: it is not UTF-8"),
        (["--prompt=a", f"--seed={2**70}", "--temperature=1"], "seed="),
        (["--prompt=" + "word " * 5000], "the prompt takes "),
    ],
)
def test_a_mistake_is_one_line(tiny, monkeypatch, capsys, flags, told):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tiny, *flags)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and told in shown and shown.count("\n") == 1
