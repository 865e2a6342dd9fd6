"""`lljax generate`: a prompt is continued, a conversation goes on, a mistake is one line."""

import io
import sys

import pytest
from generation.cases import scripted

from lljax.cli import writer
from lljax.cli.generate import main


def run(monkeypatch, base, *flags, said=""):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    main([f"--model={base}", "--tokens=4", *flags])


def test_a_conversation_goes_on_over_what_does_not_fit_until_it_is_ended(monkeypatch, capsys):
    asked, replies = [], iter(["first", "second"])
    monkeypatch.setattr(writer.Writer, "engine", None)
    monkeypatch.setattr(
        writer.Writer,
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
    assert written > 0 and read + written <= writer.open_base_models(tiny, None).extended.max_length


def test_what_the_terminal_cannot_show_is_escaped_and_a_stop_string_ends_the_text(
    tiny, tokenizer, monkeypatch
):
    tokens = [token for c in "naïve, and more" for token in tokenizer(c)["input_ids"]]
    monkeypatch.setattr(writer, "Engine", scripted(lambda request: tokens))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), encoding="ascii"))
    run(monkeypatch, tiny, "--prompt=a", "--stop= more", "--tokens=99")
    sys.stdout.flush()
    assert out.getvalue() == b"na\\xefve, and\n"


@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "--prompt or --prompt_file, or talk with --chat"),
        (["--prompt=a", "--system=b"], "--system without --chat"),
        (["--prompt=a", "--stop="], "--stop=''"),
        (["--prompt=a", "--tokens=0"], "--tokens: '0' is not a whole number above 0"),
        (["--prompt=a", "--adapter=/nope"], "--adapter=/nope: there is no such folder"),
        (
            ["--prompt_file=/dev/zero"],
            "/dev/zero: there is no such file, or it is not a regular one",
        ),
        (["--prompt=\udcff"], "--prompt: it is not UTF-8"),
        (["--prompt=a", f"--seed={2**70}", "--temperature=1"], "seed="),
        (["--prompt=" + "word " * 5000], "the prompt takes "),
    ],
)
def test_a_mistake_is_one_line(tiny, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tiny, *flags)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and message in shown and shown.count("\n") == 1


def test_the_prompt_of_a_file_is_continued(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text("import os")
    run(monkeypatch, tiny, f"--prompt_file={tmp_path / 'prompt.txt'}")
    from_file = capsys.readouterr()
    run(monkeypatch, tiny, "--prompt=import os", "--cache=full")
    assert capsys.readouterr() == from_file and from_file.out.strip()
