import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from lljax.errors import ConfigError, Stopped
from lljax.interop.export_folder import (
    add_card,
    check_out,
    edited,
    extend_record,
    read_record,
    write_folder,
)


def write(folder):
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    (folder / "weights").write_text("w")
    return "result"


def test_the_folder_appears_whole_with_a_record_of_its_files(tmp_path):
    def looks(folder):
        assert not (tmp_path / "out").exists()
        return write(folder)

    assert write_folder(tmp_path / "out", "split", looks) == "result"
    record = json.loads((tmp_path / "out" / "lljax_export.json").read_text())
    assert record == {"format": "split", "files": ["base/config.json", "weights"]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- what is there already
def test_an_export_is_replaced_where_it_is_asked_for(tmp_path):
    write_folder(tmp_path / "out", "split", write)
    with pytest.raises(ConfigError, match="holds an earlier export: --overwrite replaces it"):
        write_folder(tmp_path / "out", "peft", write)
    write_folder(
        tmp_path / "out",
        "peft",
        lambda folder: (folder / "adapter").write_text("a"),
        overwrite=True,
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "lljax_export.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_stays_where_its_successor_fails(tmp_path):
    write_folder(tmp_path / "out", "split", write)

    def fail(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_folder(tmp_path / "out", "split", fail, overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "w" and len(list(tmp_path.iterdir())) == 1


def test_of_two_exports_at_once_the_first_stays(tmp_path):
    def while_another_ends(folder):
        write_folder(tmp_path / "another", "peft", write)
        (tmp_path / "another").rename(tmp_path / "out")
        (folder / "late").write_text("x")

    with pytest.raises(ConfigError, match="holds an earlier export"):
        write_folder(tmp_path / "out", "merged", while_another_ends)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "late").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"mine": "x"},
        {"lljax_export.json": "{"},
        {"lljax_export.json": '{"files": 5}'},
        {"lljax_export.json": "[" * 100_000},
    ],
)
def test_nothing_but_an_export_is_replaced(tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="a folder that is not empty, and no export") as error:
            write_folder(out, "peft", write, overwrite)
        assert "\n" not in str(error.value)
    assert {path.name: path.read_text() for path in out.iterdir()} == content


@pytest.mark.parametrize("mine", ["notes.md", "base/notes.md", "link"])
def test_an_export_with_something_of_the_users_is_not_replaced(tmp_path, mine):
    write_folder(tmp_path / "out", "split", write)
    if mine == "link":
        (tmp_path / "out" / mine).symlink_to(tmp_path)
    else:
        (tmp_path / "out" / mine).write_text("x")
    with pytest.raises(ConfigError, match=f"holds an export and also {mine}"):
        check_out(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    "out,line",
    [
        ("/dev/null/x", "no folder can be there"),
        ("/proc/x/y", "no folder can be there"),
        ("x" * 300, "too long"),
        ("file", "is a file"),
        ("file/x", "no folder can be there"),
    ],
)
def test_a_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, out, line):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(ConfigError, match=line) as error:
        write_folder(Path(out), "peft", write)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- what killed exports leave
def dead() -> int:
    """The id of a process that was."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_killed_exports_left_is_removed_and_nothing_else(tmp_path):
    left = [f".out.{dead()}.tmp", f".out.{dead()}.old"]
    kept = [f".out.{os.getppid()}.tmp", f".other.{dead()}.tmp", ".out.mine.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", "split", write)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *kept}


def test_an_export_that_was_set_aside_when_the_process_died_comes_back(tmp_path):
    write_folder(tmp_path / "out", "split", write)
    (tmp_path / "out").rename(tmp_path / f".out.{dead()}.old")
    with pytest.raises(ConfigError, match="holds an earlier export"):
        write_folder(tmp_path / "out", "peft", write)
    assert (tmp_path / "out" / "weights").read_text() == "w"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    before = signal.getsignal(number)

    def told(folder):
        write(folder)
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(5)
        except Exception:  # as libraries do
            pytest.fail("the signal was swallowed")

    with pytest.raises(Stopped, match=f"{number.name} during the export"):
        write_folder(tmp_path / "out", "merged", told)
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) is before


def test_another_thread_exports_too(tmp_path):
    thread = threading.Thread(target=write_folder, args=(tmp_path / "out", "split", write))
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "weights").exists()


# ---------------------------------------------------------------- what a card needs
def test_the_record_has_what_a_card_says_of_the_export(tmp_path):
    out = tmp_path / "out"
    write_folder(out, "split", write)
    extend_record(out, usage="load it", base="org/base", step=3)
    record = read_record(out)
    assert record["files"] == ["base/config.json", "weights"] and record["format"] == "split"
    assert (record["usage"], record["written_to"]) == ("load it", str(out))
    assert (record["base"], record["trained"], record["step"]) == ("org/base", True, 3)
    (tmp_path / "base").mkdir()
    extend_record(out, usage="", base=str(tmp_path / "base"), trained=False)
    assert read_record(out)["base"] == str(tmp_path / "base")  # wherever it is pushed from


def test_a_card_is_part_of_the_export_until_someone_edits_it(tmp_path):
    out = tmp_path / "out"
    write_folder(out, "split", write)
    record = read_record(out)
    add_card(out, record, {"README.md": b"card", "a.png": b"a"})
    check_out(out, overwrite=True)
    add_card(out, record, {"README.md": b"card 2"})
    assert not (out / "a.png").exists() and not edited(out, record, "README.md")
    assert read_record(out)["card"] == record["card"]
    (out / "README.md").write_text("mine")
    assert edited(out, record, "README.md")
    with pytest.raises(ConfigError, match="README.md"):
        check_out(out, overwrite=True)
    add_card(out, record, {"b.png": b"b"})  # a card without README.md, which stays
    assert (out / "README.md").read_text() == "mine" and edited(out, record, "README.md")
