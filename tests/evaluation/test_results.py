import json
import math
import subprocess
import sys

import pytest

from lljax.errors import ConfigError, DataError
from lljax.evaluation import registry, results
from lljax.evaluation.results import Predictions, Score
from lljax.evaluation.task import Example, Sources
from lljax.training.report import write_report

# The package's own __init__ is left out: it would import jax, which none of this needs.
WRITER = """
import sys
import types
from pathlib import Path

sys.modules["lljax"] = types.ModuleType("lljax")
sys.modules["lljax"].__path__ = ["lljax"]
from lljax.evaluation import heatmap, registry
from lljax.evaluation.results import Predictions
from lljax.evaluation.task import Example

assert not {"jax", "torch"} & set(sys.modules)
made = Predictions(Path(sys.argv[1]))
for i in range(10**9):
    made.add("base", "needle", 512, Example(str(i), "What is it?", ("answer",), 8), "a prediction of some length " * 20)
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
        for other in (("adapter", "vt", 512, example(1)), ("base", "cwe", 512, example(1)), ("base", "vt", 1024, example(1)),
                      ("base", "vt", 512, example(2)), ("base", "vt", 512, example(1, "another"))):
            assert made.find(*other) is None
        made.add("base", "vt", 512, example(1), "again")
    with Predictions(path) as made:
        assert made.find("base", "vt", 512, example(1)) == "again"
    assert path.read_text().count("\n") == 2 and "What is" not in path.read_text()


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
            assert [made.find("base", "vt", 512, example(i)) is not None for i in range(3)] == [i < kept for i in range(3)]
            made.add("base", "vt", 512, example(9), "new")
        with Predictions(path) as made:
            assert made.find("base", "vt", 512, example(9)) == "new"
    path.write_bytes(whole + b"\0" * 40)     # as a file system may leave it
    with Predictions(path) as made:
        made.add("base", "vt", 512, example(9), "new")
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 4


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "predictions.jsonl"
    for bad in (b"{\n", b"[]\n", b'{"model": "base"}\n'):
        path.write_bytes(bad + b'{"model": "m", "task": "t", "length": 1, "id": "1", "question": "q", "prediction": "p"}\n')
        with pytest.raises(DataError, match="predictions.jsonl:1: not a prediction"):
            Predictions(path)


def test_what_was_added_outlives_a_kill(tmp_path):
    path = tmp_path / "predictions.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.kill()
    told = int((process.stdout.read().split() or [line])[-1])
    process.wait()
    with Predictions(path) as made:
        assert all(made.find("base", "needle", 512, example(i)) for i in range(told + 1))


SCORES = [Score(model, task, length, value, 10) for model, task, length, value in [
    ("base", "ruler/vt", 4096, 90.0), ("base", "ruler/fwe", 4096, 100.0), ("base", "ruler/vt", 8192, 10.0),
    ("base", "ruler/fwe", 8192, 20.0), ("adapter", "ruler/vt", 4096, 90.0), ("adapter", "ruler/fwe", 4096, 90.0),
    ("adapter", "ruler/vt", 8192, 88.0), ("adapter", "ruler/fwe", 8192, 86.0), ("adapter", "ruler/cwe", 8192, 0.0),
    ("base", "needle", 4096, 12.25), ("adapter", "zeroscrolls_test/quality", 4096, math.nan)]]


def test_the_tables_have_rows_of_models_columns_of_lengths_and_the_means_of_families(tmp_path):
    results.write(tmp_path, [Score("base", "perplexity", 512, 21.456, 5), *SCORES])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    read, made = found["tables"]
    assert read["columns"] == ["task", "model", "512"] and read["rows"] == [["perplexity", "base", "21.46"]]
    assert "perplexity: 5 documents, every length" in read["caption"]
    assert made["columns"] == ["task", "model", "4k", "8k"]
    assert ["needle", "base", "12.2", "–"] in made["rows"]
    assert ["ruler, mean of 2", "base", "95.0", "15.0"] in made["rows"]
    assert ["ruler, mean of 2", "adapter", "90.0", "87.0"] in made["rows"]       # cwe is not there at 4k
    assert ["zeroscrolls_test/quality", "adapter", "–", "–"] in made["rows"]
    assert "base none" not in made["caption"] and "base 4k, adapter 8k" in made["caption"]
    assert results.effective_lengths([*SCORES, *results.family_means(SCORES)]) == {"base": 4096, "adapter": 8192}
    text = (tmp_path / "evaluation.md").read_text()
    assert "| ruler/vt | base | 90.0 | 10.0 |\n" in text and "| task | model | 4k | 8k |\n|---|---|---:|---:|\n" in text
    assert found["scores"][1] == {"model": "base", "task": "ruler/vt", "length": 4096, "score": 90.0, "samples": 10,
                                  "groups": {}}
    assert found["images"] == [{"file": "needle-base.png", "title": "Needles found, in percent: base"}]
    assert (tmp_path / "needle-base.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_report_of_an_evaluation_embeds_its_heatmaps(tmp_path):
    results.write(tmp_path, SCORES)
    page = write_report(tmp_path).read_text()
    assert "src='data:image/png;base64,iVBOR" in page and "ruler, mean of 2" in page and "No step" not in page


def test_names_of_tasks_are_families_or_single_tasks(tmp_path):
    names = lambda *asked, **sources: [task.name for task in registry.find(asked, Sources(**sources))]
    assert names("passkey", "needle") == ["passkey/longlora", "passkey/tokens", "needle"]
    assert len(names("ruler")) == 11 and names("ruler/vt", "ruler/vt") == ["ruler/vt"]
    assert len(names("ruler", squad=tmp_path / "squad.json")) == 12
    assert len(names("zeroscrolls")) == len(names("zeroscrolls_test")) == 10 and len(names("longbench")) == 21
    assert names("longbench2", "passkey/landmark", "ruler/qa_1") == ["longbench2", "passkey/landmark", "ruler/qa_1"]
    (tmp_path / "qasper.jsonl").touch()
    assert names("longbench", longbench=tmp_path) == ["longbench/qasper"]
    with pytest.raises(DataError, match="holds none of its files, such as qasper_e.jsonl"):
        names("longbench_e", longbench=tmp_path)
    with pytest.raises(ConfigError, match="no task 'ruler/niah'; known here: ruler/niah_single_1, "):
        names("ruler/niah")
    with pytest.raises(ConfigError, match="no task 'rulr'; known here: passkey, needle, ruler, "):
        names("rulr")
