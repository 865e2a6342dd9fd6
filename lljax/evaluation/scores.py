"""Scores of models on tasks, the means of families, and effective lengths."""

import dataclasses
import math
from collections.abc import Sequence

from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.ruler import SHORTEST, TASKS, effective_length
from lljax.report.numbers import short_length

# Their authors report the mean over their tasks.
FAMILIES = ("ruler", "longbench", "longbench_e", "zeroscrolls")
# Groups of LongBench-E and LongBench v2 with a row of their own, in this order. (The depths of a
# needle are in its heatmap.)
GROUPS = ("0-4k", "4-8k", "8k+", "easy", "hard", "short", "medium", "long")


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a model on a task at a length.

    score: 0 to 100; for the protocols of perplexity, the perplexity; NaN if nothing could be
      scored.
    samples: examples, documents or windows; 0 if unknown. groups: the scores of parts of the
      examples, by name.
    texts: for a perplexity that predicts the same tokens at every length, a digest of them; only
      scores of the same texts are compared.
    """

    model: str
    task: str
    length: int
    score: float
    samples: int
    groups: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: str = ""


def family_of(task: str) -> str:
    """The family of a task as --tasks names it."""
    family = task.partition("/")[0]
    return "longbench_e" if family == "longbench" and task.endswith("_e") else family


def family_means(scores: Sequence[Score]) -> list[Score]:
    """The mean over a family's tasks for each model and length with more than one score.

    The number of tasks is part of the name, so that means over different numbers never share a row.
    """
    means = []
    for family in FAMILIES:
        for model in dict.fromkeys(score.model for score in scores):
            members = [
                s
                for s in scores
                if s.model == model and family_of(s.task) == family and not math.isnan(s.score)
            ]
            for length in sorted({score.length for score in members}):
                at_length = [score for score in members if score.length == length]
                if len(at_length) > 1:
                    means.append(
                        Score(
                            model=model,
                            task=f"{family}, mean of {len(at_length)}",
                            length=length,
                            score=sum(s.score for s in at_length) / len(at_length),
                            samples=sum(s.samples for s in at_length),
                        )
                    )
    return means


def families_with_mean(means: Sequence[Score]) -> set[str]:
    return {family_of(mean.task.partition(",")[0]) for mean in means}


def with_groups(scores: Sequence[Score]) -> list[Score]:
    """Every score followed by its GROUPS, as tasks of their own."""
    result = []
    for score in scores:
        result.append(score)
        result += [
            dataclasses.replace(
                score, task=f"{score.task}, {group}", score=score.groups[group], samples=0
            )
            for group in GROUPS
            if group in score.groups
        ]
    return result


def split_by_texts(scores: Sequence[Score]) -> list[Score]:
    """Scores of one task on different texts as different tasks, named by the number and the length
    of the texts.
    """
    groups: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        groups.setdefault(score.task, {}).setdefault(score.texts, []).append(score)
    result = []
    for task, by_texts in groups.items():
        for group in by_texts.values():
            name = task
            if len(by_texts) > 1:
                samples, unit = max(s.samples for s in group), PROTOCOLS[task].partition(",")[0]
                longest = short_length(max(s.length for s in group))
                name = f"{task}, {samples} {unit} to {longest}"
            result += [dataclasses.replace(score, task=name) for score in group]
    return result


def sample_counts(scores: Sequence[Score]) -> dict[str, set[int]]:
    """The numbers of examples behind the scores of each task."""
    counts: dict[str, set[int]] = {}
    for score in scores:
        if score.samples and not math.isnan(score.score):
            counts.setdefault(score.task, set()).add(score.samples)
    return counts


def effective_lengths(means: Sequence[Score]) -> dict[str, int | None]:
    """RULER's effective length of each model that has the mean of all its tasks."""
    by_model: dict[str, dict[int, float]] = {}
    for score in means:
        if score.task == f"ruler, mean of {len(TASKS)}" and score.length >= SHORTEST:
            by_model.setdefault(score.model, {})[score.length] = score.score
    return {model: effective_length(by_length) for model, by_length in by_model.items()}
