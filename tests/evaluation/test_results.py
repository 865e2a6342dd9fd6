"""The finding, the charts, and the files of an evaluation."""

import json
import math

import pytest

from lljax.evaluation import needle, results
from lljax.evaluation.scores import Score
from lljax.report.page import write_report

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


def test_the_finding_compares_trained_and_base_at_the_longest_length():
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


def test_a_heatmap_has_the_number_of_examples_behind_each_cell():
    groups = {needle.group(depth): 100.0 for depth in needle.DEPTHS}
    *_, chart = results.charts(
        [Score("base", "needle", length, 100.0, n, groups) for length, n in ((4096, 11), (512, 33))]
    )
    assert (
        chart["lengths"] == [512, 4096]
        and chart["samples"] == [3, 1]
        and len(chart["values"]) == len(chart["rows"]) == 11
    )


def test_curves_are_of_tasks_with_two_lengths_and_of_means_instead_of_a_familys_tasks():
    told = [
        ("base", "perplexity", 512, 20.0),
        ("base", "perplexity", 1024, math.nan),
        ("trained", "perplexity", 1024, 19.0),
        ("base", "passkey/tokens", 512, 90.0),
        ("base", "passkey/tokens", 1024, 80.0),
        ("base", "longbench/qmsum", 8192, 1),
    ]
    scores = [*SCORES, *(Score(*each, 10) for each in told)]
    assert results.scores_by_length(scores) == {
        "perplexity": {"base": {512: 20.0}, "trained": {1024: 19.0}},
        "passkey/tokens": {"base": {512: 90.0, 1024: 80.0}},
        "ruler, mean of 2": {"base": {4096: 95.0, 8192: 15.0}, "adapter": {4096: 90.0}},
    }
    alone = [score for score in SCORES if score.task == "ruler/vt"]
    assert results.scores_by_length(alone) == {
        "ruler/vt": {"base": {4096: 90.0, 8192: 10.0}, "adapter": {4096: 90.0, 8192: 88.0}}
    }


def test_an_evaluation_keeps_earlier_scores_of_the_same_models(tmp_path):
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
def test_an_odd_evaluation_json_is_ignored(tmp_path, broken):
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
