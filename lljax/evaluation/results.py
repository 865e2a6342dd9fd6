"""The results of an evaluation: its finding, its charts, and the files that hold them."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lljax.data.files import atomic_write, read_object
from lljax.evaluation import needle
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.scores import (
    Score,
    families_with_mean,
    family_means,
    family_of,
    split_by_texts,
)
from lljax.evaluation.tables import markdown, tables
from lljax.run.open import BASE, STRETCHED, TRAINED

PERCENTAGES = ("needle", "passkey")  # tasks whose score is a share of successes
TITLES = {"perplexity": "Perplexity", "needle": "Needles found"}


def finding(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The effect of training, at the longest length at which the trained model has a score:
    {"what", "before": of the base (None if it has no score), "after", "note"}, as text.

    One row for each task; a family with a mean has one row for the mean.
    """
    means = family_means(scores)
    families = families_with_mean(means)
    order = [*PROTOCOLS, "needle"]
    by_key = {(s.task, s.model, s.length): s for s in [*scores, *means] if math.isfinite(s.score)}
    tasks = dict.fromkeys(
        task for task, _, _ in by_key if family_of(task) not in families or "," in task
    )
    rows = []
    for task in sorted(tasks, key=lambda task: order.index(task) if task in order else len(order)):
        models = dict.fromkeys(model for other, model, _ in by_key if other == task)
        for model in (model for model in models if model.startswith(TRAINED)):
            of_model = [s for s in by_key.values() if (s.task, s.model) == (task, model)]
            after = max(of_model, key=lambda score: score.length)
            suffix = model.removeprefix(TRAINED)  # how the model was asked
            before, stretched = (
                by_key.get((task, name + suffix, after.length)) for name in (BASE, STRETCHED)
            )
            note = f"n={after.samples}"
            if stretched:
                note += f", RoPE stretched, nothing trained: {_text(stretched)}"
            rows.append(
                {
                    "what": f"{TITLES.get(task, task)} at {after.length:,} tokens{suffix}",
                    "before": _text(before) if before else None,
                    "after": _text(after),
                    "note": note,
                }
            )
    return rows


def _text(score: Score) -> str:
    if score.task in PROTOCOLS:
        return f"{score.score:,.2f}"
    return f"{score.score:.0f}%" if score.task.startswith(PERCENTAGES) else f"{score.score:.1f}"


def scores_by_length(scores: Sequence[Score]) -> dict[str, dict[str, dict[int, float]]]:
    """{task: {model: {length: score}}} of every task with scores at two lengths or more; the mean
    of a family stands for its tasks.
    """
    means = family_means(scores)
    families = families_with_mean(means)
    drawn = [
        *split_by_texts([score for score in scores if score.task in PROTOCOLS]),
        *(s for s in scores if s.task not in PROTOCOLS and family_of(s.task) not in families),
        *means,
    ]
    lines: dict[str, dict[str, dict[int, float]]] = {}
    for score in drawn:
        if math.isfinite(score.score):
            lines.setdefault(score.task, {}).setdefault(score.model, {})[score.length] = score.score
    return {
        task: by_model
        for task, by_model in lines.items()
        if len({length for line in by_model.values() for length in line}) > 1
    }


def charts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The charts of the report: curves of the scores by length, and a heatmap of the needles of
    each model. Rows of `lljax.report.evaluations.CHARTS` draw them.
    """
    needles = dict.fromkeys(score.model for score in scores if score.task == "needle")
    return [
        *(_curves(task, lines) for task, lines in scores_by_length(scores).items()),
        *(_heatmap(scores, model) for model in needles),
    ]


def _curves(task: str, lines: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    perplexity = task.partition(",")[0] in PROTOCOLS
    lengths = sorted({length for line in lines.values() for length in line})
    return {
        "kind": "curves",
        "title": f"Held-out {task} by length" if perplexity else f"{task} by length, 0 to 100",
        "log": perplexity,
        "lengths": lengths,
        "lines": {model: [line.get(length) for length in lengths] for model, line in lines.items()},
    }


def _heatmap(scores: Sequence[Score], model: str) -> dict[str, Any]:
    by_length = sorted(
        (score for score in scores if (score.task, score.model) == ("needle", model)),
        key=lambda score: score.length,
    )
    grid = needle.grid({score.length: score.groups for score in by_length})
    return {
        "kind": "heatmap",
        "title": f"Needles found, in percent: {model}",
        "lengths": [score.length for score in by_length],
        "rows": [f"{depth}%" for depth in needle.DEPTHS],
        "values": [[_finite(value) for value in row] for row in grid.tolist()],
        "samples": [s.samples // len(s.groups) if s.groups else 0 for s in by_length],
    }


def write(folder: Path, scores: Sequence[Score], keys: Mapping[str, str]) -> list[Score]:
    """Writes the tables to evaluation.md, and tables, scores, finding and charts to
    evaluation.json, which the report reads. Returns all scores that are there now.

    keys: {name of a model in the scores: its identity}. Scores that `folder` holds of the same
      models stay unless they were measured again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores, keys = _merged(folder / "evaluation.json", scores, keys)
    all_tables = tables(scores)
    content = {
        "finding": finding(scores),
        "tables": all_tables,
        "charts": charts(scores),
        "keys": keys,
        "scores": [*map(_plain, scores)],
        "means": [*map(_plain, family_means(scores))],
    }
    atomic_write(folder / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    atomic_write(folder / "evaluation.md", "\n".join(map(markdown, all_tables)))
    return scores


def _merged(
    path: Path, scores: Sequence[Score], keys: Mapping[str, str]
) -> tuple[list[Score], dict[str, str]]:
    """The scores together with those scores of an earlier evaluation.json whose models are the
    same, and the keys of all their models.
    """
    content = read_object(path)
    before, rows = (content.get(name) for name in ("keys", "scores"))
    known = {}
    if isinstance(before, dict):
        known = {name: key for name, key in before.items() if key in keys.values()}
    read = [_score(row) for row in rows] if isinstance(rows, list) else []
    old = [score for score in read if score and score.model in known]
    # A score that was measured again stays in its place.
    merged = {(s.model, s.task, s.length): s for s in [*old, *scores]}
    return list(merged.values()), known | dict(keys)


def _plain(score: Score) -> dict[str, Any]:
    """A score as JSON, which has no NaN."""
    groups = {name: _finite(value) for name, value in score.groups.items()}
    return dataclasses.asdict(score) | {"score": _finite(score.score), "groups": groups}


def _score(row: Any) -> Score | None:
    """A score from its `_plain` form; None for anything else."""
    groups = row.get("groups") if isinstance(row, dict) else None
    if not isinstance(groups, dict) or not all(
        map(_is_number_or_none, [row.get("score"), *groups.values()])
    ):
        return None
    if not all(type(row.get(name)) is str for name in ("model", "task")):
        return None
    if not all(
        type(row.get(name)) is int and 0 <= row[name] < 2**63 for name in ("length", "samples")
    ):
        return None
    return Score(
        model=row["model"],
        task=row["task"],
        length=row["length"],
        score=_or_nan(row["score"]),
        samples=row["samples"],
        groups={name: _or_nan(value) for name, value in groups.items()},
        texts=str(row.get("texts", "")),
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) and abs(value) < 1e300


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def file_name(model: str) -> str:
    """The name of a model as part of a file's name."""
    return re.sub(r"\W+", "-", model.lower()).strip("-")
