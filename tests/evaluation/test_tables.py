"""Tables of scores: rows, cells, and the numbers of examples."""

import math

from lljax.evaluation import results
from lljax.evaluation.scores import Score
from lljax.evaluation.tables import tables


def test_the_number_of_examples_is_in_the_cells_if_it_differs_and_otherwise_in_the_caption():
    made = lambda *told: tables(
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


def test_perplexities_of_different_texts_have_separate_rows_and_curves():
    scores = [
        Score(model, "perplexity", length, 20.0, n, texts=texts)
        for model in ("base", "trained")
        for length, n, texts in ((512, 8, "a"), (1024, 8, "a"), (4096, 5, "b"))
    ]
    (made,) = tables(scores)
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
    assert list(results.scores_by_length(scores)) == ["perplexity, 8 documents to 1k"]
    assert tables(scores[:2])[0]["rows"] == [["perplexity", "base", "20.00", "20.00"]]


def test_the_groups_of_longbench_have_rows_and_the_depths_of_needles_have_none():
    (made,) = tables(
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
