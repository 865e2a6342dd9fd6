"""Predictions are on disk when they are made, and found again."""

import subprocess
import sys

import pytest

from lljax.errors import DataError
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.task import Example

# The package's __init__ is left out: it would import jax, which none of this needs.
WRITER = """
import sys
import types
from pathlib import Path

sys.modules["lljax"] = types.ModuleType("lljax")
sys.modules["lljax"].__path__ = ["lljax"]
from lljax.evaluation import registry
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.task import Example

assert not {"jax", "torch"} & set(sys.modules)
made = Predictions(Path(sys.argv[1]))
for i in range(10**9):
    example = Example(str(i), "What is it?", ("answer",), 8)
    made.add("base", "needle", 512, example, "a prediction of some length " * 20)
    print(i, flush=True)
"""


def example(i, prompt="What is it?"):
    return Example(str(i), prompt, ("answer",), 8)


def test_predictions_are_found_again_by_model_task_length_and_question(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    with Predictions(path) as made:
        assert made.find("base", "vt", 512, example(1)) is None
        made.add("base", "vt", 512, example(1), "one\n\u2028two")
        assert made.find("base", "vt", 512, example(1)) == "one\n\u2028two"
    with Predictions(path) as made:
        assert made.find("base", "vt", 512, example(1)) == "one\n\u2028two"
        for other in (
            ("adapter", "vt", 512, example(1)),
            ("base", "cwe", 512, example(1)),
            ("base", "vt", 1024, example(1)),
            ("base", "vt", 512, example(2)),
            ("base", "vt", 512, example(1, "another")),
        ):
            assert made.find(*other) is None
        made.add("base", "vt", 512, example(1), "again")
    with Predictions(path) as made:
        assert made.find("base", "vt", 512, example(1)) == "again"
        made.find("base", "vt", 1024, example(1))
        made.add("base", "vt", 512, example(3), "three")
        assert (
            made.of("base", "vt", 512) == {"1": "again", "3": "three"}
            and made.of("base", "vt", 1024) == {}
        )
    with Predictions(path) as made:
        made.find("base", "vt", 512, example(3))
        made.find("base", "vt", 512, example(1, "a question of another file"))
        assert made.of("base", "vt", 512) == {"3": "three"}  # no more than this command asks
    assert path.read_text().count("\n") == 3 and "What is" not in path.read_text()


def test_a_file_torn_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with Predictions(path) as made:
        for i in range(3):
            made.add("base", "vt", 512, example(i), f"prediction {i}")
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 7), *ends, *(end - 1 for end in ends)}:
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Predictions(path) as made:
            assert [made.find("base", "vt", 512, example(i)) is not None for i in range(3)] == [
                i < kept for i in range(3)
            ]
            made.add("base", "vt", 512, example(9), "new")
        with Predictions(path) as made:
            assert made.find("base", "vt", 512, example(9)) == "new"
    path.write_bytes(whole + b"\0" * 40)  # as a file system may leave it
    with Predictions(path) as made:
        made.add("base", "vt", 512, example(9), "new")
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 4


def test_damaged_lines_are_skipped_with_a_warning_and_asked_again(tmp_path, caplog):
    path = tmp_path / "predictions.jsonl"
    with Predictions(path) as made:
        for i in range(2):
            made.add("base", "vt", 512, example(i), "kept")
    first, last = path.read_bytes().splitlines(keepends=True)
    for bad in (
        b"{\n",
        b"[]\n",
        b"5\n",
        b"\xff\xfe\n",
        b'{"model": "base"}\n',
        b"[" * 100_000 + b"\n",
        b"1" * 5000 + b"\n",
        last.replace(b'"base"', b'["base"]'),
        last.replace(b'"kept"', b"5"),
        last[:40] + b"\n",
    ):
        caplog.clear()
        path.write_bytes(first + bad + last)
        with Predictions(path) as made:
            assert [made.find("base", "vt", 512, example(i)) for i in range(3)] == [
                "kept",
                "kept",
                None,
            ]
            made.add("base", "vt", 512, example(2), "again")
        assert "predictions.jsonl:2: 1 damaged lines" in caplog.text
        with Predictions(path) as made:
            assert made.find("base", "vt", 512, example(2)) == "again"


def test_anything_but_a_file_is_refused(tmp_path):
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "device", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="predictions"):
            Predictions(path)


def test_an_added_prediction_outlives_a_kill(tmp_path):
    path = tmp_path / "predictions.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.kill()
    told = int((process.stdout.read().split() or [line])[-1])
    process.wait()
    with Predictions(path) as made:
        assert all(made.find("base", "needle", 512, example(i)) for i in range(told + 1))
