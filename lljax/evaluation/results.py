"""What an evaluation leaves: every prediction as soon as it is made, and tables and pictures of the scores at the end."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lljax.errors import DataError
from lljax.evaluation import curves, heatmap, needle
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.ruler import SHORTEST, TASKS, THRESHOLD, effective_length
from lljax.evaluation.task import Example
from lljax.training.charts import short_length

FAMILIES = ("ruler", "longbench", "longbench_e", "zeroscrolls")      # their authors report the mean of their tasks
# Those that get a row, in this order: of LongBench-E and LongBench v2. (The depths of a needle are in its heatmap.)
GROUPS = ("0-4k", "4-8k", "8k+", "easy", "hard", "short", "medium", "long")


class Predictions:
    """A JSONL file of predictions, a line each, that a kill at any moment leaves usable: what is added is on disk.

    A prediction is found again by model, task, length and example, and only if the question is still the same. `model`
    must name everything about it that changes its answers. The file holds answers and predictions, and no prompts.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._made, whole = _read(path)
        self._asked: dict[tuple, str] = {}
        self._file = open(path, "ab")
        self._file.truncate(whole)           # what a kill left of a line

    def find(self, model: str, task: str, length: int, example: Example) -> str | None:
        key = model, task, length, example.id, _digest(example)
        if key in self._made:
            self._asked[key] = self._made[key]
        return self._made.get(key)

    def add(self, model: str, task: str, length: int, example: Example, prediction: str) -> None:
        row = {"model": model, "task": task, "length": length, "id": example.id, "question": _digest(example),
               "prediction": prediction, "answers": example.answers}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        key = model, task, length, example.id, row["question"]
        self._made[key] = self._asked[key] = prediction

    def of(self, model: str, task: str, length: int) -> dict[str, str]:
        """The predictions of a task by the id of the example: of those found or added since the file was opened, and none that
        it holds beside them."""
        return {key[3]: prediction for key, prediction in self._asked.items() if key[:3] == (model, task, length)}

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _digest(example: Example) -> str:
    """Tells questions apart."""
    return hashlib.sha256(json.dumps([example.prompt, example.answer_prefix, example.tokens]).encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[tuple, str], int]:
    """The predictions by their key, and how many bytes hold whole lines.

    Raises:
      DataError: a line before the last is damaged.
    """
    made, whole = {}, 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            made[row["model"], row["task"], row["length"], row["id"], row["question"]] = row["prediction"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a prediction; delete the line to have it made again") from None
            break
        whole += len(line)
    return made, whole


@dataclasses.dataclass(frozen=True)
class Score:
    """score: 0 to 100, of `perplexity` and what begins so the perplexity itself; NaN where nothing could be scored.
    samples: examples, documents or windows. groups: the scores of parts of the examples, by their name."""

    model: str
    task: str
    length: int
    score: float
    samples: int
    groups: dict[str, float] = dataclasses.field(default_factory=dict)


def family_means(scores: Sequence[Score]) -> list[Score]:
    """For each model and length the mean of a family's tasks, over those that have a score there: how many is in its name, so
    that means of more and of fewer tasks do not share a row."""
    found = []
    for family in FAMILIES:
        for model in dict.fromkeys(score.model for score in scores):
            told = [s for s in scores if s.model == model and _family(s.task) == family and not math.isnan(s.score)]
            for length in sorted({score.length for score in told}):
                here = [score for score in told if score.length == length]
                if len(here) > 1:
                    found.append(Score(model, f"{family}, mean of {len(here)}", length, sum(s.score for s in here) / len(here),
                                       sum(s.samples for s in here)))
    return found


def _family(task: str) -> str:
    """As --tasks calls it."""
    family = task.partition("/")[0]
    return "longbench_e" if family == "longbench" and task.endswith("_e") else family


def _with_groups(scores: Sequence[Score]) -> list[Score]:
    """Each with those of GROUPS after it, as tasks of their own."""
    return [each for score in scores for each in (
        score, *(dataclasses.replace(score, task=f"{score.task}, {group}", score=score.groups[group])
                 for group in GROUPS if group in score.groups))]


def tables(scores: Sequence[Score]) -> list[dict]:
    """Tables of perplexities and of other scores, as the report takes them: columns, rows, caption.

    Their rows are of task and model, and they have a column for each length.
    """
    told = [score for protocol in PROTOCOLS for score in scores if score.task == protocol]
    others = [score for score in scores if score.task not in PROTOCOLS]
    made = []
    if told:
        most = {score.task: max(other.samples for other in told if other.task == score.task) for score in told}
        made.append(_table(told, "Held-out perplexity by length in tokens, full attention. " + " ".join(
            f"{task}: {samples} {PROTOCOLS[task]}." for task, samples in most.items()), decimals=2))
    if others:
        means = family_means(others)
        caption = "Scores from 0 to 100 by length in tokens."
        if reached := effective_lengths(means):
            caption += f" Effective length, up to which RULER's mean stays above {THRESHOLD}: " + ", ".join(
                f"{model} {short_length(length) if length else 'none'}" for model, length in reached.items()) + "."
        made.append(_table([*_with_groups(others), *means], caption, decimals=1))
    return made


def _table(scores: Sequence[Score], caption: str, decimals: int) -> dict:
    lengths = sorted({score.length for score in scores})
    cells = {(score.task, score.model, score.length): score.score for score in scores}
    rows = [[task, model, *(_shown(cells.get((task, model, length), math.nan), decimals) for length in lengths)]
            for task in dict.fromkeys(score.task for score in scores)
            for model in dict.fromkeys(score.model for score in scores) if any((task, model, n) in cells for n in lengths)]
    return {"columns": ["task", "model", *map(short_length, lengths)], "rows": rows, "caption": caption}


def drawn_by_length(scores: Sequence[Score]) -> dict[str, dict[str, dict[int, float]]]:
    """What is drawn: {task: {model: {length: score}}} of each task with scores at two lengths or more, and in place of a
    family's tasks their mean, where there is one."""
    means = family_means(scores)
    meant = {_family(mean.task.partition(",")[0]) for mean in means}
    drawn: dict[str, dict[str, dict[int, float]]] = {}
    for score in [*(score for score in scores if _family(score.task) not in meant), *means]:
        if math.isfinite(score.score):
            drawn.setdefault(score.task, {}).setdefault(score.model, {})[score.length] = score.score
    return {task: lines for task, lines in drawn.items() if len({length for line in lines.values() for length in line}) > 1}


def effective_lengths(means: Sequence[Score]) -> dict[str, int | None]:
    """RULER's effective length of each model that has the mean of all its tasks, at the lengths that are RULER's."""
    found: dict[str, dict[int, float]] = {}
    for score in means:
        if score.task == f"ruler, mean of {len(TASKS)}" and score.length >= SHORTEST:
            found.setdefault(score.model, {})[score.length] = score.score
    return {model: effective_length(by_length) for model, by_length in found.items()}


def write(folder: Path, scores: Sequence[Score], keys: Mapping[str, str]) -> list[Score]:
    """The tables as evaluation.md, and with the scores themselves as evaluation.json, which the report reads; and as PNGs
    curves of the scores by length, and a heatmap of each model's needles.

    keys: what tells each model, by its name in the scores, from others of that name. The scores of earlier commands that
    `folder` holds of the same models stay, but for those that are measured again. Returns all that is there now.
    """
    scores, keys = _merged(folder / "evaluation.json", scores, keys)
    made, images = tables(scores), []
    for task, lines in drawn_by_length(scores).items():
        log = task in PROTOCOLS
        title = f"Held-out {task} by length" if log else f"{task} by length, 0 to 100"
        images.append({"file": f"curve-{file_name(task)}.png", "title": title})
        _replace(folder / images[-1]["file"], curves.png(title, lines, log=log))
    for model in dict.fromkeys(score.model for score in scores if score.task == "needle"):
        groups = {score.length: score.groups for score in scores if (score.task, score.model) == ("needle", model)}
        title = f"Needles found, in percent: {model}"
        images.append({"file": f"needle-{file_name(model)}.png", "title": title})
        _replace(folder / images[-1]["file"], heatmap.png(title, sorted(groups), needle.DEPTHS, needle.grid(groups)))
    plain = lambda scores: [dataclasses.asdict(s) | {"score": _number(s.score),
                                                     "groups": {k: _number(v) for k, v in s.groups.items()}} for s in scores]
    text = json.dumps({"tables": made, "images": images, "keys": keys, "scores": plain(scores),
                       "means": plain(family_means(scores))}, indent=2, allow_nan=False) + "\n"
    _replace(folder / "evaluation.json", text.encode())
    _replace(folder / "evaluation.md", "\n".join(map(markdown, made)).encode())
    return scores


def _merged(path: Path, scores: Sequence[Score], keys: Mapping[str, str]) -> tuple[list[Score], dict[str, str]]:
    """The scores with those of an evaluation.json before them that still hold, and the keys of all their models.

    Those of a protocol of perplexity go together: what it reads may depend on all the lengths, and a row compares them.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value = lambda number: math.nan if number is None else number
        old = [Score(**row | {"score": value(row["score"]), "groups": {k: value(v) for k, v in row["groups"].items()}})
               for row in found["scores"]]
        known = {name: key for name, key in found["keys"].items() if key in keys.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        old, known = [], {}                  # there is none, or it is not ours
    places = lambda scores: {(s.model, s.task, s.length): s for s in scores}       # one measured again stays in its place
    new, every = places(scores), places([*(score for score in old if score.model in known), *scores])
    again = {(model, task) for model, task, _ in new if task in PROTOCOLS}
    return [score for place, score in every.items() if place in new or place[:2] not in again], known | dict(keys)


def file_name(model: str) -> str:
    """The name of a model as part of that of a file."""
    return re.sub(r"\W+", "-", model.lower()).strip("-")


def markdown(made: dict) -> str:
    line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    rule = "|---|---|" + "---:|" * (len(made["columns"]) - 2) + "\n"
    return line(made["columns"]) + rule + "".join(map(line, made["rows"])) + f"\n{made['caption']}\n"


def _shown(score: float, decimals: int) -> str:
    return "–" if math.isnan(score) else f"{score:,.{decimals}f}"


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
