"""`lljax data`: documents made, checked, measured and shown."""

import json
import re
import shutil

import pytest

from lljax.cli.data import main


@pytest.fixture
def tree(tmp_path):
    for name, content in {
        "b.py": b"x = 1\r\n",
        "a/c.py": b"y = 2",
        "a/d.md": "é\n".encode(),
        "a/nul.py": b"a\0b",
        "empty.py": b" \n",
    }.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "tree"


@pytest.fixture
def command(capsys):
    def command(*arguments) -> tuple[int, str, str]:
        """Runs the command in this process; returns exit code, stdout, stderr."""
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return command


def test_the_command_makes_checks_and_shows_documents(tree, tmp_path, tiny, command):
    out = tmp_path / "rows.jsonl"
    assert command("folder", tree, "--include=*.py", f"--out={out}")[0] == 0
    assert "2 good, 0 bad" in command("validate", out)[1]
    code, shown, _ = command("show", out, f"--model={tiny}", "--row=1")
    assert code == 0 and "[### file: b.py" in shown and "<end>]" in shown
    code, table, _ = command("stats", out, f"--model={tiny}")
    assert code == 0 and "documents" in table and "longest" in table


def test_the_command_takes_several_patterns_and_says_what_it_skipped(tree, tmp_path, command):
    out = tmp_path / "[red]" / "rows.jsonl"
    code, printed, _ = command(
        "folder", "--include=*.py", "--include=*.md", "--exclude=b*", tree, f"--out={out}"
    )
    assert code == 0 and f"{out}: 2 documents" in printed and "2 files skipped" in printed
    before = out.read_bytes()
    assert (
        command("folder", tree, "--include=*.none", f"--out={out}")[0] == 3
        and out.read_bytes() == before
    )


def test_the_command_names_bad_rows_and_exits_with_3(tmp_path, command):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": 3}\n')
    code, out, error = command("validate", file)
    assert code == 3 and f"{file}:2: 'text' is a int" in out
    assert error.startswith("DataError: 1 of 2 rows") and error.count("\n") == 1
    assert command("validate", file, "--max_bad_fraction=0.5")[0] == 0


MARKED = (
    "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' }}<{{ m.role }}>"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture
def chat(tiny, tmp_path):
    """A base with a chat template."""
    shutil.copytree(tiny, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(MARKED)
    return tmp_path / "chat"


def test_validate_with_a_model_refuses_what_a_run_refuses_and_says_what_it_does_not_check_without(
    chat, tmp_path, command
):
    file = tmp_path / "rows.jsonl"
    reply = {"role": "assistant", "content": "b"}
    file.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"messages": [reply], "id": 1},
                {"messages": [{"role": "user", "content": "a"}]},
                {"messages": [{"role": "tool", "content": "a"}, reply]},
            )
        )
    )
    code, out, error = command("validate", file)
    assert code == 3 and f"{file}:2: the conversation has no assistant message" in out
    assert "id (1 row)" in out and "3 rows, 2 good, 1 bad; not checked without --model" in out
    code, out, error = command("validate", file, f"--model={chat}")
    assert (
        code == 3
        and f"{file}:3: " in out
        and "3 rows, 1 good, 2 bad\n" in out
        and error.startswith("DataError: 2 of 3")
    )
    file.write_text(json.dumps({"messages": [{"role": "tool", "content": "a"}, reply]}))
    code, out, error = command("validate", file, f"--model={chat}")
    assert (
        code == 3
        and f"{file}:1: " in out
        and error.startswith("DataError: data=")
        and error.count("\n") == 1
    )


def test_stats_says_rows_and_steps_an_epoch_and_what_is_left_out(tmp_path, tiny, command):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in (15, 15, 15, 40, 100)))
    code, out, _ = command(
        "stats",
        file,
        f"--model={tiny}",
        "--length=16",
        "--rows=2",
        "--overlong=drop",
        "--no_packing",
    )
    assert (
        code == 0
        and re.search(r"rows of 16 tokens an epoch\W+3\W", out)
        and re.search(r"2 rows each\W+2\W", out)
    )
    assert "2 of 5 documents are longer than 16 tokens" in out


def test_show_shows_every_trained_span_of_a_long_row_and_no_terminal_codes(tmp_path, chat, command):
    file = tmp_path / "rows.jsonl"
    turns = [
        {"role": role, "content": f"{role}{i} " + 300 * "." + f"\x1b[31m end{i}"}
        for i in range(3)
        for role in ("user", "assistant")
    ]
    file.write_text(json.dumps({"messages": turns}))
    code, out, _ = command("show", file, f"--model={chat}", "--tokens=240")
    assert code == 0 and "in 3 spans" in out and "\x1b" not in out and "tokens …" in out
    joined = out.replace("\n", "")
    assert all(f"assistant{i} " in joined and f"end{i}<end>]" in joined for i in range(3))
    code, out, _ = command("show", file, f"--model={chat}", "--tokens=48")
    assert "4 further spans" in out.replace("\n", " ")
    assert command("show", file, f"--model={chat}", "--row=1")[2] == (
        "ConfigError: --row=1: there is no such row; they are counted from 0\n"
    )


PAIRS = [
    {"prompt": f"ask {i}: ", "chosen": "yes, this", "rejected": "no", "score": 1} for i in range(3)
]


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return tmp_path / "pairs.jsonl"


def test_validate_reads_rows_as_the_kind_that_is_named(pairs, tiny, command):
    code, out, _ = command("validate", pairs, "--kind=pairs")
    assert code == 0 and "3 rows, 3 good, 0 bad" in out and "score (3 rows)" in out
    assert "3 good" in command("validate", pairs, "--kind=judged", f"--model={tiny}")[1]
    out = command("validate", pairs, "--kind=prompts")[1]  # all other keys are columns
    assert "3 good" in out and "nothing reads" not in out
    code, out, _ = command("validate", pairs)
    assert code == 3 and "'chosen': a pair of answers, which objective.name='dpo'" in out


def test_stats_of_pairs_count_answers_and_what_sharing_prompts_saves(pairs, tiny, command):
    code, out, _ = command("stats", pairs, "--kind=pairs", f"--model={tiny}", "--length=64")
    assert code == 0
    for name, value in {
        "pairs": "3",
        "chosen answers": "3",
        "rejected answers": "3",
        "rejected answers, longest": "3",
        "rows of 64 tokens an epoch": "1",
    }.items():
        assert re.search(rf"│ {name} +│ +{value} │", out), name
    assert re.search(r"share that sharing prompts saves +│ +\d\d\.\d% │", out)
    code, _, error = command("stats", pairs, "--kind=pairs", f"--model={tiny}", "--overlong=split")
    assert code == 2 and "data.overlong='split': groups of answers are never split" in error
    code, _, error = command(
        "stats", pairs, "--kind=pairs", f"--model={tiny}", "--loss_on=everything"
    )
    assert code == 3 and "data.loss_on='everything' is for documents" in error


def test_stats_of_prompts_count_them_and_the_dropped(pairs, tiny, command):
    code, out, _ = command("stats", pairs, "--kind=prompts", f"--model={tiny}", "--length=3")
    assert code == 0 and "3 of 3 prompts are longer than 3 tokens" in out
    assert "trained: the rest are prompts" not in out


def test_show_says_which_answer_is_which(pairs, tiny, command):
    code, out, _ = command("show", pairs, "--kind=pairs", f"--model={tiny}", "--row=1")
    assert code == 0 and "a prompt and its answers: chosen, rejected" in out
    assert "ask 1: \nchosen: [yes, this<end>]\nrejected: [no<end>]" in out
    code, out, _ = command("show", pairs, "--kind=prompts", f"--model={tiny}")
    assert code == 0 and "ask 0: " in out and "[" not in out.split("spans")[1]
    assert "columns for reward functions: chosen, rejected, score" in out


def test_the_standard_library_becomes_documents(tmp_path, monkeypatch, command, tree):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tree))
    out = tmp_path / "stdlib.jsonl"
    code, printed, _ = command("stdlib", f"--out={out}")
    assert code == 0 and f"{out}: 2 documents" in printed


def test_an_unknown_model_is_named_by_its_flag(tmp_path, command):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    code, _, error = command("stats", tmp_path / "rows.jsonl", "--model=/nope")
    assert code == 2 and error.startswith("ModelError: --model='/nope': no such folder")
