import fcntl
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from lljax.data import folders
from lljax.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def tree(tmp_path):
    for name, content in {
        "b.py": b"x = 1\r\n",
        "a/c.py": b"y = 2",
        "a/d.md": "é\n".encode(),
        "a/raw.bin": b"\xff\xfe",
        "a/nul.py": b"a\0b",
        "empty.py": b" \n",
        ".hidden/e.py": b"z",
        "__pycache__/f.py": b"z",
    }.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "tree"


def test_text_files_become_documents_behind_their_marker_in_sorted_order(tree):
    assert list(folders.documents(tree)) == [
        "### file: a/c.py\ny = 2\n",
        "### file: a/d.md\né\n",
        "### file: b.py\nx = 1\r\n",
    ]
    assert list(folders.documents(tree, ("*.py",), ("b*",))) == ["### file: a/c.py\ny = 2\n"]


def test_a_repository_joins_the_files_of_a_folder(tree):
    assert list(folders.documents(tree, repository=True)) == [
        "### file: a/c.py\ny = 2\n\n### file: a/d.md\né\n",
        "### file: b.py\nx = 1\r\n",
    ]


def test_files_beyond_the_limit_are_left_out(tree, monkeypatch):
    monkeypatch.setattr(folders, "MAX_FILE", 5)
    assert list(folders.documents(tree, ("*.py",))) == ["### file: a/c.py\ny = 2\n"]


def test_what_cannot_be_read_is_left_out_and_named(tree):
    (tree / "link.py").symlink_to("nowhere")
    with open(os.fsencode(tree) + b"/n\xff.py", "w") as file:
        file.write("x")
    skipped = []
    assert len(list(folders.documents(tree, ("*.py",), skipped=skipped))) == 2
    assert sorted(map(os.fsencode, skipped)) == [b"a/nul.py", b"empty.py", b"link.py", b"n\xff.py"]


def test_the_output_is_not_its_own_input_and_stays_where_nothing_is_written(tree):
    out = tree / "rows.jsonl"
    for _ in range(2):
        assert folders.write_jsonl(folders.documents(tree, out=out), out)[0] == 3
    before = out.read_bytes()
    assert folders.write_jsonl([], out) == (0, 0) and out.read_bytes() == before
    assert not list(tree.glob("*.tmp"))


def test_written_rows_are_read_back(tree, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    rows, characters = folders.write_jsonl(folders.documents(tree), out)
    texts = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert texts == list(folders.documents(tree)) and (rows, characters) == (
        3,
        sum(map(len, texts)),
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["rows.jsonl"]


def test_links_out_of_the_folder_are_left_out_unless_asked_for(tree, tmp_path):
    (tmp_path / "secret.py").write_text("password")
    (tree / ".env").write_text("token")
    for name, target in {
        "out.py": "../secret.py",
        "a/up.py": tmp_path / "secret.py",
        "hidden.py": ".env",
        "loop.py": "loop.py",
        "same.py": "b.py",
    }.items():
        (tree / name).symlink_to(target)
    skipped = []
    texts = list(folders.documents(tree, ("*.py",), skipped=skipped))
    assert texts == [
        "### file: a/c.py\ny = 2\n",
        "### file: b.py\nx = 1\r\n",
        "### file: same.py\nx = 1\r\n",
    ]
    assert {"out.py", "a/up.py", "hidden.py", "loop.py"} <= set(skipped)
    (tmp_path / "linked").symlink_to(tree)  # the folder itself may be a link
    assert list(folders.documents(tmp_path / "linked", ("*.py",))) == texts
    everything = "".join(folders.documents(tree, ("*.py",), follow_links=True))
    assert everything.count("password") == 2 and everything.count("token") == 1


def test_a_name_with_a_newline_makes_one_marker(tree):
    (tree / "z\n### file: forged.py").write_text("x")
    assert list(folders.documents(tree, ("z*",))) == ["### file: z\\n### file: forged.py\nx\n"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tree, tmp_path):
    for out in (tree, tree / "b.py" / "rows.jsonl"):
        with pytest.raises(ConfigError, match="--out=.*cannot be written"):
            folders.write_jsonl(["a"], out)

    def broken():
        yield "a"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        folders.write_jsonl(broken(), tmp_path / "new" / "rows.jsonl")
    assert not list((tmp_path / "new").iterdir())
    # of a process that writes, and then of one killed
    with open(tmp_path / "new" / ".rows.jsonl.tmp", "w") as other:
        other.write("half of a row")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing it"):
            folders.write_jsonl(["a"], tmp_path / "new" / "rows.jsonl")
    assert folders.write_jsonl(["a"], tmp_path / "new" / "rows.jsonl") == (1, 1)
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ['{"text": "a"}\n']


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*arguments) -> tuple[int, str, str]:
        """Runs the script as a user would; returns exit code, stdout, stderr."""
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return command


def test_the_script_makes_checks_and_shows_documents(tree, tmp_path, tiny, command):
    out = tmp_path / "rows.jsonl"
    assert command("folder", tree, "--include=*.py", f"--out={out}")[0] == 0
    assert "2 good, 0 bad" in command("validate", out)[1]
    code, shown, _ = command("show", out, f"--model={tiny}", "--row=1")
    assert code == 0 and "[### file: b.py" in shown and "<end>]" in shown
    code, table, _ = command("stats", out, f"--model={tiny}")
    assert code == 0 and "documents" in table and "longest" in table


def test_the_script_takes_several_patterns_and_says_what_it_skipped(tree, tmp_path, command):
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


def test_the_script_names_bad_rows_and_exits_with_3(tmp_path, command):
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
    assert "id (1 rows)" in out and "3 rows, 2 good, 1 bad; not checked without --model" in out
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
