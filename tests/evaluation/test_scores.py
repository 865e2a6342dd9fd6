"""Means of families and effective lengths."""

import math

from lljax.evaluation import ruler
from lljax.evaluation.scores import Score, family_means
from lljax.evaluation.tables import tables


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
    assert [(s.task, s.length, round(s.score, 6)) for s in family_means(short + long)] == [
        ("ruler, mean of 12", 512, 90.0),
        ("ruler, mean of 13", 4096, 84.0),
    ]


def test_an_effective_length_takes_all_thirteen_tasks_from_4096_tokens_up():
    told = lambda scores: tables(scores)[0]["caption"].partition("above 85.6: ")[2]
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
    assert [(score.task, score.score) for score in family_means(scores)] == [
        ("longbench, mean of 3", 30.0),
        ("longbench_e, mean of 2", 40.0),
    ]
