import fcntl
import json
import os

import pytest

from lljax.data import folders
from lljax.errors import ConfigError


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
