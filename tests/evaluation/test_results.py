import json
import math
import subprocess
import sys

import pytest

from lljax.errors import ConfigError, DataError
from lljax.evaluation import needle, registry, results, ruler
from lljax.evaluation.results import Predictions, Score
from lljax.evaluation.task import Example, Sources
from lljax.report.page import write_report

# The package's own __init__ is left out: it would import jax, which none of this needs.
WRITER = """
import sys
import types
from pathlib import Path

sys.modules["lljax"] = types.ModuleType("lljax")
sys.modules["lljax"].__path__ = ["lljax"]
from lljax.evaluation import registry
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


def test_damaged_lines_are_passed_over_said_and_asked_again(tmp_path, caplog):
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


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "device", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="predictions"):
            Predictions(path)


def test_what_was_added_outlives_a_kill(tmp_path):
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


SCORES = [
    Score(model, task, length, value, 10)
    for model, task, length, value in [
        ("base", "ruler/vt", 4096, 90.0),
        ("base", "ruler/fwe", 4096, 100.0),
        ("base", "ruler/vt", 8192, 10.0),
        ("base", "ruler/fwe", 8192, 20.0),
        ("adapter", "ruler/vt", 4096, 90.0),
        ("adapter", "ruler/fwe", 4096, 90.0),
        ("adapter", "ruler/vt", 8192, 88.0),
        ("adapter", "ruler/fwe", 8192, 86.0),
        ("adapter", "ruler/cwe", 8192, 0.0),
        ("base", "needle", 4096, 12.25),
        ("adapter", "zeroscrolls_test/quality", 4096, math.nan),
    ]
]


def test_the_tables_have_rows_of_models_columns_of_lengths_and_the_means_of_families(tmp_path):
    written = [Score("base", "perplexity", 512, 21.456, 5), *SCORES]
    assert results.write(tmp_path, written, {}) == written
    found = json.loads((tmp_path / "evaluation.json").read_text())
    read, made = found["tables"]
    assert read["columns"] == ["task", "model", "512"] and read["rows"] == [
        ["perplexity", "base", "21.46"]
    ]
    assert "perplexity: 5 documents, every length" in read["caption"]
    assert made["columns"] == ["task", "model", "4k", "8k"]
    assert ["needle", "base", "12.2", "–"] in made["rows"]
    assert ["ruler, mean of 2", "base", "95.0", "15.0"] in made["rows"]
    assert ["ruler, mean of 2", "adapter", "90.0", "–"] in made["rows"]  # cwe is not there at 4k
    assert ["ruler, mean of 3", "adapter", "–", "58.0"] in made["rows"]
    assert ["zeroscrolls_test/quality", "adapter", "–", "–"] in made["rows"]
    assert "ffective" not in made["caption"]  # which takes all thirteen
    text = (tmp_path / "evaluation.md").read_text()
    assert (
        "| ruler/vt | base | 90.0 | 10.0 |\n" in text
        and "| task | model | 4k | 8k |\n|---|---|---:|---:|\n" in text
    )
    assert found["scores"][1] == {
        "model": "base",
        "task": "ruler/vt",
        "length": 4096,
        "score": 90.0,
        "samples": 10,
        "groups": {},
        "texts": "",
    }
    assert [(chart["kind"], chart["title"]) for chart in found["charts"]] == [
        ("curves", "ruler, mean of 2 by length, 0 to 100"),
        ("heatmap", "Needles found, in percent: base"),
    ]
    assert found["charts"][0]["lengths"] == [4096, 8192] and found["charts"][0]["lines"][
        "adapter"
    ] == [90.0, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_the_number_of_examples_is_said_in_the_cells_where_it_is_not_the_same_and_else_below():
    made = lambda *told: results.tables(
        [Score(model, task, length, 50.0, n) for model, task, length, n in told]
    )[-1]
    alike = made(("base", "needle", 512, 11), ("trained", "needle", 1024, 11))
    assert "length in tokens, 11 examples each." in alike["caption"] and alike["rows"][0] == [
        "needle",
        "base",
        "50.0",
        "–",
    ]
    unlike = made(
        ("base", "needle", 512, 11),
        ("base", "needle", 1024, 55),
        ("trained", "needle", 1024, 55),
        ("base", "longbench2", 512, 9),
    )
    assert unlike["rows"] == [
        ["needle", "base", "50.0 (n=11)", "50.0 (n=55)"],
        ["needle", "trained", "–", "50.0 (n=55)"],
        ["longbench2", "base", "50.0", "–"],
    ]
    assert "; 9 examples of longbench2." in unlike["caption"]
    read = made(("base", "perplexity", 512, 5), ("base", "perplexity", 1024, 8))
    assert read["rows"] == [["perplexity", "base", "50.00 (n=5)", "50.00 (n=8)"]]
    assert "perplexity: 5 to 8 documents" in read["caption"]


def test_perplexities_of_other_texts_have_rows_and_curves_of_their_own():
    scores = [
        Score(model, "perplexity", length, 20.0, n, texts=texts)
        for model in ("base", "trained")
        for length, n, texts in ((512, 8, "a"), (1024, 8, "a"), (4096, 5, "b"))
    ]
    (made,) = results.tables(scores)
    assert made["rows"] == [
        ["perplexity, 8 documents to 1k", "base", "20.00", "20.00", "–"],
        ["perplexity, 8 documents to 1k", "trained", "20.00", "20.00", "–"],
        ["perplexity, 5 documents to 4k", "base", "–", "–", "20.00"],
        ["perplexity, 5 documents to 4k", "trained", "–", "–", "20.00"],
    ]
    assert (
        "perplexity, 5 documents to 4k: 5 documents, every length predicts the same tokens."
        in made["caption"]
    )
    assert list(results.drawn_by_length(scores)) == ["perplexity, 8 documents to 1k"]
    assert results.tables(scores[:2])[0]["rows"] == [["perplexity", "base", "20.00", "20.00"]]


def test_the_finding_is_what_was_trained_against_the_base_at_the_longest_length():
    told = [
        ("base", "perplexity", 512, 20.0),
        ("base", "perplexity", 4096, 111.211),
        ("trained", "perplexity", 4096, 18.899),
        (results.STRETCHED, "perplexity", 4096, 22.86),
        ("trained", "needle", 4096, 36.36),
        ("base", "needle", 4096, 0.0),
        ("base", "passkey/tokens", 8192, 100.0),
        ("trained, chat", "passkey/tokens", 4096, 80.0),
        *[("trained", f"ruler/{task}", 4096, 90.0) for task in ("vt", "fwe")],
    ]
    assert results.finding([Score(*each, 11) for each in told]) == [
        {
            "what": "Perplexity at 4,096 tokens",
            "before": "111.21",
            "after": "18.90",
            "note": "n=11, RoPE stretched, nothing trained: 22.86",
        },
        {"what": "Needles found at 4,096 tokens", "before": "0%", "after": "36%", "note": "n=11"},
        {
            "what": "passkey/tokens at 4,096 tokens, chat",
            "before": None,
            "after": "80%",
            "note": "n=11",
        },
        {
            "what": "ruler, mean of 2 at 4,096 tokens",
            "before": None,
            "after": "90.0",
            "note": "n=22",
        },
    ]
    assert results.finding([Score("base", "perplexity", 512, 20.0, 5)]) == []


def test_a_heatmap_says_of_how_many_examples_each_cell_is():
    groups = {needle.group(depth): 100.0 for depth in needle.DEPTHS}
    *_, chart = results.charts(
        [Score("base", "needle", length, 100.0, n, groups) for length, n in ((4096, 11), (512, 33))]
    )
    assert (
        chart["lengths"] == [512, 4096]
        and chart["samples"] == [3, 1]
        and len(chart["values"]) == len(chart["rows"]) == 11
    )


def test_drawn_by_length_are_tasks_with_two_of_them_and_means_in_place_of_a_familys_tasks():
    told = [
        ("base", "perplexity", 512, 20.0),
        ("base", "perplexity", 1024, math.nan),
        ("trained", "perplexity", 1024, 19.0),
        ("base", "passkey/tokens", 512, 90.0),
        ("base", "passkey/tokens", 1024, 80.0),
        ("base", "longbench/qmsum", 8192, 1),
    ]
    scores = [*SCORES, *(Score(*each, 10) for each in told)]
    assert results.drawn_by_length(scores) == {
        "perplexity": {"base": {512: 20.0}, "trained": {1024: 19.0}},
        "passkey/tokens": {"base": {512: 90.0, 1024: 80.0}},
        "ruler, mean of 2": {"base": {4096: 95.0, 8192: 15.0}, "adapter": {4096: 90.0}},
    }
    alone = [score for score in SCORES if score.task == "ruler/vt"]
    assert results.drawn_by_length(alone) == {
        "ruler/vt": {"base": {4096: 90.0, 8192: 10.0}, "adapter": {4096: 90.0, 8192: 88.0}}
    }


def thirteen(model, by_length):
    return [
        Score(model, f"ruler/{task}", length, value, 10)
        for task in ruler.TASKS
        for length, value in by_length.items()
    ]


def test_a_task_that_is_too_long_for_a_short_length_counts_at_the_others():
    short = [
        Score("base", f"ruler/{task}", 512, math.nan if i == 2 else 90.0, 10)
        for i, task in enumerate(ruler.TASKS)
    ]
    long = [
        Score("base", f"ruler/{task}", 4096, 0.0 if i == 2 else 91.0, 10)
        for i, task in enumerate(ruler.TASKS)
    ]
    assert [(s.task, s.length, round(s.score, 6)) for s in results.family_means(short + long)] == [
        ("ruler, mean of 12", 512, 90.0),
        ("ruler, mean of 13", 4096, 84.0),
    ]


def test_an_effective_length_is_that_of_all_thirteen_tasks_from_4096_tokens_up():
    told = lambda scores: results.tables(scores)[0]["caption"].partition("above 85.6: ")[2]
    of_all = thirteen("base", {1024: 10.0, 4096: 90.0, 8192: 85.7, 16384: 85.0}) + thirteen(
        "trained", {4096: 85.0, 8192: 99.0}
    )
    assert told(of_all) == "base 8k, trained none."
    assert (
        told([score for score in of_all if (score.task, score.model) != ("ruler/qa_1", "base")])
        == "trained none."
    )
    assert told([score for score in of_all if score.task != "ruler/qa_1"]) == ""
    assert told(thirteen("base", {1024: 99.0, 2048: 99.0})) == ""
    assert (
        told([score for score in of_all if (score.task, score.length) != ("ruler/vt", 8192)])
        == "base 4k, trained none."
    )


def test_longbench_e_is_a_family_of_its_own():
    scores = [
        Score("base", f"longbench/{task}", 4096, value, 10)
        for task, value in (
            ("qasper", 10.0),
            ("qasper_e", 20.0),
            ("trec", 30.0),
            ("trec_e", 60.0),
            ("lsht", 50.0),
        )
    ]
    assert [(score.task, score.score) for score in results.family_means(scores)] == [
        ("longbench, mean of 3", 30.0),
        ("longbench_e, mean of 2", 40.0),
    ]


def test_the_groups_of_longbench_have_rows_and_the_depths_of_needles_have_none():
    (made,) = results.tables(
        [
            Score("base", "longbench2", 4096, 30.0, 9, {"hard": 20.0, "short": 30.0, "easy": 40.0}),
            Score("base", "longbench2", 8192, 31.0, 9, {"hard": 21.0, "long": math.nan}),
            Score("base", "longbench/trec_e", 4096, 50.0, 9, {"8k+": 10.0, "0-4k": 90.0}),
            Score("base", "longbench/lcc_e", 4096, 70.0, 9, {"8k+": 70.0}),
            Score("base", "needle", 4096, 60.0, 9, {"0%": 50.0, "100%": 70.0}),
        ]
    )
    assert made["rows"] == [
        ["longbench2", "base", "30.0", "31.0"],
        ["longbench2, easy", "base", "40.0", "–"],
        ["longbench2, hard", "base", "20.0", "21.0"],
        ["longbench2, short", "base", "30.0", "–"],
        ["longbench2, long", "base", "–", "–"],
        ["longbench/trec_e", "base", "50.0", "–"],
        ["longbench/trec_e, 0-4k", "base", "90.0", "–"],
        ["longbench/trec_e, 8k+", "base", "10.0", "–"],
        ["longbench/lcc_e", "base", "70.0", "–"],
        ["longbench/lcc_e, 8k+", "base", "70.0", "–"],
        ["needle", "base", "60.0", "–"],
        ["longbench_e, mean of 2", "base", "60.0", "–"],
    ]


def test_an_evaluation_keeps_what_earlier_ones_found_of_the_same_models(tmp_path):
    read = lambda: {
        (row["model"], row["task"], row["length"]): row["score"]
        for row in json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    }
    keys = {"base": "base 1", "trained": "trained 1"}
    results.write(
        tmp_path,
        [
            Score(model, task, length, 1.0, 5)
            for model in keys
            for task in ("perplexity", "ruler/vt")
            for length in (512, 1024)
        ]
        + [Score("base", "needle", 512, 1.0, 1, {"0%": math.nan})],
        keys,
    )
    found = results.write(
        tmp_path,
        [
            Score("base", "ruler/vt", 1024, 2.0, 5),
            Score("base", "ruler/fwe", 1024, 2.0, 5),
            Score("base, chat", "ruler/vt", 1024, 3.0, 5),
        ],
        {"base": "base 1", "base, chat": "base 1", "trained": "trained 2"},
    )
    assert [(score.model, score.task, score.length, score.score) for score in found] == [
        ("base", "perplexity", 512, 1.0),
        ("base", "perplexity", 1024, 1.0),
        ("base", "ruler/vt", 512, 1.0),
        ("base", "ruler/vt", 1024, 2.0),
        ("base", "needle", 512, 1.0),
        ("base", "ruler/fwe", 1024, 2.0),
        ("base, chat", "ruler/vt", 1024, 3.0),
    ]  # of what was trained before nothing holds
    text = (tmp_path / "evaluation.md").read_text()
    assert (
        "| perplexity | base | 1.00 | 1.00 |" in text and "| ruler/vt | base | 1.0 | 2.0 |" in text
    )
    assert json.loads((tmp_path / "evaluation.json").read_text())["charts"] and math.isnan(
        found[4].groups["0%"]
    )
    # Other lengths of a task stay, of perplexity too, and nothing else is touched; means are made,
    # not kept.
    results.write(
        tmp_path,
        [Score("base", "perplexity", 2048, 4.0, 5), Score("base", "perplexity", 512, 6.0, 5)],
        {"base": "base 1"},
    )
    assert read() == {
        ("base", "perplexity", 512): 6.0,
        ("base", "perplexity", 1024): 1.0,
        ("base", "perplexity", 2048): 4.0,
        ("base", "ruler/vt", 512): 1.0,
        ("base", "ruler/vt", 1024): 2.0,
        ("base", "needle", 512): 1.0,
        ("base", "ruler/fwe", 1024): 2.0,
        ("base, chat", "ruler/vt", 1024): 3.0,
    }


GOOD = {
    "model": "base",
    "task": "ruler/vt",
    "length": 512,
    "score": 50.0,
    "samples": 5,
    "groups": {},
}


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        "5",
        "[" * 100_000,
        "\0" * 50,
        '{"scores": [{"model": "base"}], "keys": {}}',
        '{"scores": [1], "keys": []}',
        {"scores": 5, "keys": 5},
        {"scores": [GOOD], "keys": [["base", "base 1"]]},
        *(
            {"keys": {"base": "base 1"}, "scores": [GOOD | {field: value}]}
            for field, value in (
                ("model", ["base"]),
                ("model", None),
                ("task", {}),
                ("length", "512"),
                ("length", 512.5),
                ("length", -1),
                ("length", 10**400),
                ("length", True),
                ("score", "50"),
                ("score", 10**400),
                ("samples", None),
                ("groups", []),
                ("groups", {"0%": "a"}),
            )
        ),
    ],
    ids=str,
)
def test_an_odd_evaluation_json_is_passed_over(tmp_path, broken):
    (tmp_path / "evaluation.json").write_text(
        broken if isinstance(broken, str) else json.dumps(broken)
    )
    new = Score("base", "ruler/fwe", 512, 5.0, 5)
    assert results.write(tmp_path, [new], {"base": "base 1"}) == [new]
    write_report(tmp_path)


def test_sound_scores_beside_a_damaged_one_stay(tmp_path):
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"keys": {"base": "base 1"}, "scores": [GOOD | {"score": "x"}, GOOD]})
    )
    new = Score("base", "ruler/fwe", 512, 5.0, 5)
    assert results.write(tmp_path, [new], {"base": "base 1"}) == [
        Score("base", "ruler/vt", 512, 50.0, 5),
        new,
    ]


def test_the_report_of_an_evaluation_draws_its_charts(tmp_path):
    results.write(
        tmp_path,
        [
            *SCORES,
            Score(
                "base",
                "needle",
                512,
                100.0,
                33,
                {needle.group(depth): 100.0 for depth in needle.DEPTHS},
            ),
        ],
        {},
    )
    page = write_report(tmp_path).read_text()
    assert (
        page.count("<svg") == 3
        and "ruler, mean of 2" in page
        and "n=3" in page
        and "No step" not in page
    )


def test_names_of_tasks_are_families_or_single_tasks(tmp_path):
    names = lambda *asked, **sources: [
        task.name for task in registry.find(asked, Sources(**sources))
    ]
    assert names("passkey", "needle") == ["passkey/longlora", "passkey/tokens", "needle"]
    assert len(names("ruler")) == 11 and names("ruler/vt", "ruler/vt") == ["ruler/vt"]
    assert len(names("ruler", squad=tmp_path / "squad.json")) == 12
    assert (
        len(names("zeroscrolls")) == len(names("zeroscrolls_test")) == 10
        and len(names("longbench")) == 21
    )
    assert names("longbench2", "passkey/landmark", "ruler/qa_1") == [
        "longbench2",
        "passkey/landmark",
        "ruler/qa_1",
    ]
    (tmp_path / "qasper.jsonl").touch()
    assert names("longbench", longbench=tmp_path) == ["longbench/qasper"]
    with pytest.raises(DataError, match="holds none of its files, such as qasper_e.jsonl"):
        names("longbench_e", longbench=tmp_path)
    with pytest.raises(
        ConfigError, match="no task 'ruler/niah'; known here: ruler/niah_single_1, "
    ):
        names("ruler/niah")
    with pytest.raises(
        ConfigError, match="no task 'rulr'; known here: passkey, needle, .*, perplexity, "
    ):
        names("rulr")
    with pytest.raises(
        ConfigError,
        match="no task 'perplexity/new'; known here: perplexity, .*, perplexity/new_tokens$",
    ):
        names("perplexity/new")
