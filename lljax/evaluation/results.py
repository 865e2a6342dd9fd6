"""What an evaluation leaves: every prediction as soon as it is made, and at the end its finding,
tables and charts.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lljax.data.files import atomic_write, read_object
from lljax.errors import DataError, first_line, printable
from lljax.evaluation import needle
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.ruler import SHORTEST, TASKS, THRESHOLD, effective_length
from lljax.evaluation.task import Example
from lljax.report.numbers import short_length
from lljax.run.open import BASE, STRETCHED, TRAINED

# their authors report the mean of their tasks
FAMILIES = ("ruler", "longbench", "longbench_e", "zeroscrolls")
# Those that get a row, in this order: of LongBench-E and LongBench v2. (The depths of a needle are
# in its heatmap.)
GROUPS = ("0-4k", "4-8k", "8k+", "easy", "hard", "short", "medium", "long")
SHARES = ("needle", "passkey")  # tasks of which a score is the share that was found
MISSING = "–"
KEY = ("model", "task", "length", "id", "question")  # what a prediction is found by


class Predictions:
    """A JSONL file of predictions, a line each, that a kill at any moment leaves usable: what is
    added is on disk.

    A prediction is found again by model, task, length and example, and only if the question is
    still the same. `model` must name everything about it that changes its answers. The file holds
    answers and predictions, and no prompts.

    Raises:
      DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: predictions are kept there, and it is not a regular file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made, whole = _read(path)
            self._file = open(path, "ab")
        except OSError as error:
            raise DataError(
                f"{path}: predictions cannot be kept there ({first_line(error)})"
            ) from None
        self._asked: dict[tuple, str] = {}
        self._file.truncate(whole)  # what a kill left of a line

    def find(self, model: str, task: str, length: int, example: Example) -> str | None:
        key = model, task, length, example.id, _digest(example)
        if key in self._made:
            self._asked[key] = self._made[key]
        return self._made.get(key)

    def add(self, model: str, task: str, length: int, example: Example, prediction: str) -> None:
        row = {
            "model": model,
            "task": task,
            "length": length,
            "id": example.id,
            "question": _digest(example),
            "prediction": prediction,
            "answers": example.answers,
        }
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        key = model, task, length, example.id, row["question"]
        self._made[key] = self._asked[key] = prediction

    def of(self, model: str, task: str, length: int) -> dict[str, str]:
        """The predictions of a task by the id of the example: of those found or added since the
        file was opened, and none that it holds beside them.
        """
        return {
            key[3]: prediction
            for key, prediction in self._asked.items()
            if key[:3] == (model, task, length)
        }

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _digest(example: Example) -> str:
    """Tells questions apart."""
    return hashlib.sha256(
        json.dumps([example.prompt, example.answer_prefix, example.tokens]).encode()
    ).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[tuple, str], int]:
    """The predictions by their key, and how many bytes hold whole lines. Damaged lines are passed
    over, and logged: what they held is asked again.
    """
    made, whole, damaged = {}, 0, []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            key, prediction = tuple(row[name] for name in KEY), row["prediction"]
            if not isinstance(prediction, str):
                raise TypeError
            made[key] = prediction
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
        whole += len(line)
    if damaged:
        logging.warning(
            "%s:%d: %d damaged lines are passed over, and what they held is asked again",
            printable(str(path)),
            damaged[0],
            len(damaged),
        )
    return made, whole


@dataclasses.dataclass(frozen=True)
class Score:
    """score: 0 to 100, of `perplexity` and what begins so the perplexity itself; NaN where nothing
    could be scored.
    samples: examples, documents or windows; 0 where it is not known. groups: the scores of parts of
      the examples, by their name. texts: of a perplexity that predicts the same tokens at every
      length a digest of them: those of unlike ones are not compared.
    """

    model: str
    task: str
    length: int
    score: float
    samples: int
    groups: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: str = ""


def family_means(scores: Sequence[Score]) -> list[Score]:
    """For each model and length the mean of a family's tasks, over those that have a score there:
    how many is in its name, so that means of more and of fewer tasks do not share a row.
    """
    found = []
    for family in FAMILIES:
        for model in dict.fromkeys(score.model for score in scores):
            told = [
                s
                for s in scores
                if s.model == model and _family(s.task) == family and not math.isnan(s.score)
            ]
            for length in sorted({score.length for score in told}):
                here = [score for score in told if score.length == length]
                if len(here) > 1:
                    found.append(
                        Score(
                            model,
                            f"{family}, mean of {len(here)}",
                            length,
                            sum(s.score for s in here) / len(here),
                            sum(s.samples for s in here),
                        )
                    )
    return found


def _family(task: str) -> str:
    """As --tasks calls it."""
    family = task.partition("/")[0]
    return "longbench_e" if family == "longbench" and task.endswith("_e") else family


def _with_groups(scores: Sequence[Score]) -> list[Score]:
    """Each with those of GROUPS after it, as tasks of their own."""
    return [
        each
        for score in scores
        for each in (
            score,
            *(
                dataclasses.replace(
                    score, task=f"{score.task}, {group}", score=score.groups[group], samples=0
                )
                for group in GROUPS
                if group in score.groups
            ),
        )
    ]


def tables(scores: Sequence[Score]) -> list[dict]:
    """Tables of perplexities and of other scores, as the report takes them: columns, rows, caption.

    Their rows are of task and model, and they have a column for each length. How many examples
    there were is in the caption; where a task has unlike numbers of them, in each of its cells.
    """
    told = _apart([score for protocol in PROTOCOLS for score in scores if score.task == protocol])
    others = [score for score in scores if score.task not in PROTOCOLS]
    made = []
    if told:
        counts = {task: sorted(found) for task, found in _counts(told).items()}
        made.append(
            _table(
                told,
                "Held-out perplexity by length in tokens, full attention. "
                + " ".join(
                    f"{task}: {' to '.join(map(str, dict.fromkeys([n[0], n[-1]])))} {PROTOCOLS[task.partition(',')[0]]}."
                    for task, n in counts.items()
                ),
                decimals=2,
            )
        )
    if others:
        means = family_means(others)
        caption = f"Scores from 0 to 100 by length in tokens{_examples_told(_counts(others))}."
        if reached := effective_lengths(means):
            caption += (
                f" Effective length, up to which RULER's mean stays above {THRESHOLD}: "
                + ", ".join(
                    f"{model} {short_length(length) if length else 'none'}"
                    for model, length in reached.items()
                )
                + "."
            )
        made.append(_table([*_with_groups(others), *means], caption, decimals=1))
    return made


def _apart(scores: Sequence[Score]) -> list[Score]:
    """Those that were measured on unlike texts as tasks of their own, named by how many and how
    long these are.
    """
    groups: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        groups.setdefault(score.task, {}).setdefault(score.texts, []).append(score)
    name = lambda task, group: (
        task
        if len(groups[task]) == 1
        else (
            f"{task}, {max(s.samples for s in group)} {PROTOCOLS[task].partition(',')[0]} to "
            f"{short_length(max(s.length for s in group))}"
        )
    )
    return [
        dataclasses.replace(score, task=name(task, group))
        for task, by_texts in groups.items()
        for group in by_texts.values()
        for score in group
    ]


def _counts(scores: Sequence[Score]) -> dict[str, set[int]]:
    """By task the numbers of examples behind its scores."""
    found: dict[str, set[int]] = {}
    for score in scores:
        if score.samples and not math.isnan(score.score):
            found.setdefault(score.task, set()).add(score.samples)
    return found


def _examples_told(counts: Mapping[str, set[int]]) -> str:
    """For a caption: ", 10 examples each", or which tasks have how many; of those with unlike
    numbers the cells say it.
    """
    numbers = sorted(set().union(*counts.values()))
    if len(numbers) == 1:
        return f", {numbers[0]} example{'s' * (numbers[0] != 1)} each"
    alike = {n: [task for task, found in counts.items() if found == {n}] for n in numbers}
    return "".join(f"; {n} examples of {', '.join(tasks)}" for n, tasks in alike.items() if tasks)


def _table(scores: Sequence[Score], caption: str, decimals: int) -> dict:
    lengths = sorted({score.length for score in scores})
    unlike = {task for task, found in _counts(scores).items() if len(found) > 1}
    cells = {
        (score.task, score.model, score.length): _shown(score.score, decimals)
        + (f" (n={score.samples})" if score.task in unlike and not math.isnan(score.score) else "")
        for score in scores
    }
    rows = [
        [task, model, *(cells.get((task, model, length), MISSING) for length in lengths)]
        for task in dict.fromkeys(score.task for score in scores)
        for model in dict.fromkeys(score.model for score in scores)
        if any((task, model, n) in cells for n in lengths)
    ]
    return {
        "columns": ["task", "model", *map(short_length, lengths)],
        "rows": rows,
        "caption": caption,
    }


def finding(scores: Sequence[Score]) -> list[dict]:
    """What training changed: of each task (of a family with a mean the mean) at the longest length
    that what was trained has a score at, {"what", "before": of the base (None where it has none),
    "after", "note"}, in words.
    """
    means = family_means(scores)
    meant = {_family(mean.task.partition(",")[0]) for mean in means}
    order = [*PROTOCOLS, "needle"]
    place = lambda task: order.index(task) if task in order else len(order)
    at = {(s.task, s.model, s.length): s for s in [*scores, *means] if math.isfinite(s.score)}
    made = []
    for task in sorted(
        dict.fromkeys(task for task, _, _ in at if _family(task) not in meant or "," in task),
        key=place,
    ):
        for model in dict.fromkeys(
            model for name, model, _ in at if name == task and model.startswith(TRAINED)
        ):
            after = max(
                (s for s in at.values() if (s.task, s.model) == (task, model)),
                key=lambda score: score.length,
            )
            how = model.removeprefix(TRAINED)
            before, stretched = (
                at.get((task, name + how, after.length)) for name in (BASE, STRETCHED)
            )
            what = {"perplexity": "Perplexity", "needle": "Needles found"}.get(task, task)
            note = f"n={after.samples}" + (
                f", RoPE stretched, nothing trained: {_told(stretched)}" if stretched else ""
            )
            made.append(
                {
                    "what": f"{what} at {after.length:,} tokens{how}",
                    "before": _told(before) if before else None,
                    "after": _told(after),
                    "note": note,
                }
            )
    return made


def _told(score: Score) -> str:
    if score.task in PROTOCOLS:
        return f"{score.score:,.2f}"
    return f"{score.score:.0f}%" if score.task.startswith(SHARES) else f"{score.score:.1f}"


def drawn_by_length(scores: Sequence[Score]) -> dict[str, dict[str, dict[int, float]]]:
    """What is drawn: {task: {model: {length: score}}} of each task with scores at two lengths or
    more, and in place of a family's tasks their mean, where there is one.
    """
    means = family_means(scores)
    meant = {_family(mean.task.partition(",")[0]) for mean in means}
    drawn: dict[str, dict[str, dict[int, float]]] = {}
    for score in [
        *_apart([score for score in scores if score.task in PROTOCOLS]),
        *(
            score
            for score in scores
            if score.task not in PROTOCOLS and _family(score.task) not in meant
        ),
        *means,
    ]:
        if math.isfinite(score.score):
            drawn.setdefault(score.task, {}).setdefault(score.model, {})[score.length] = score.score
    return {
        task: lines
        for task, lines in drawn.items()
        if len({length for line in lines.values() for length in line}) > 1
    }


def effective_lengths(means: Sequence[Score]) -> dict[str, int | None]:
    """RULER's effective length of each model that has the mean of all its tasks, at the lengths
    that are RULER's.
    """
    found: dict[str, dict[int, float]] = {}
    for score in means:
        if score.task == f"ruler, mean of {len(TASKS)}" and score.length >= SHORTEST:
            found.setdefault(score.model, {})[score.length] = score.score
    return {model: effective_length(by_length) for model, by_length in found.items()}


def charts(scores: Sequence[Score]) -> list[dict]:
    """What the report draws: curves of the scores by length, and of each model a heatmap of its
    needles.
    """
    made = []
    for task, lines in drawn_by_length(scores).items():
        perplexity = task.partition(",")[0] in PROTOCOLS
        lengths = sorted({length for line in lines.values() for length in line})
        made.append(
            {
                "kind": "curves",
                "title": f"Held-out {task} by length"
                if perplexity
                else f"{task} by length, 0 to 100",
                "log": perplexity,
                "lengths": lengths,
                "lines": {
                    model: [line.get(length) for length in lengths] for model, line in lines.items()
                },
            }
        )
    for model in dict.fromkeys(score.model for score in scores if score.task == "needle"):
        found = sorted(
            (score for score in scores if (score.task, score.model) == ("needle", model)),
            key=lambda s: s.length,
        )
        made.append(
            {
                "kind": "heatmap",
                "title": f"Needles found, in percent: {model}",
                "lengths": [score.length for score in found],
                "rows": [f"{depth}%" for depth in needle.DEPTHS],
                "values": [
                    [_number(value) for value in row]
                    for row in needle.grid({score.length: score.groups for score in found}).tolist()
                ],
                "samples": [
                    score.samples // len(score.groups) if score.groups else 0 for score in found
                ],
            }
        )
    return made


def write(folder: Path, scores: Sequence[Score], keys: Mapping[str, str]) -> list[Score]:
    """The tables as evaluation.md, and with the scores themselves, the finding and what is drawn as
    evaluation.json, which the report reads.

    keys: what tells each model, by its name in the scores, from others of that name. The scores of
      earlier commands that `folder` holds of the same models stay, but for those that are measured
      again. Returns all that is there now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores, keys = _merged(folder / "evaluation.json", scores, keys)
    made = tables(scores)
    plain = lambda scores: [
        dataclasses.asdict(s)
        | {"score": _number(s.score), "groups": {k: _number(v) for k, v in s.groups.items()}}
        for s in scores
    ]
    atomic_write(
        folder / "evaluation.json",
        json.dumps(
            {
                "finding": finding(scores),
                "tables": made,
                "charts": charts(scores),
                "keys": keys,
                "scores": plain(scores),
                "means": plain(family_means(scores)),
            },
            indent=2,
            allow_nan=False,
        )
        + "\n",
    )
    atomic_write(folder / "evaluation.md", "\n".join(map(markdown, made)))
    return scores


def _merged(
    path: Path, scores: Sequence[Score], keys: Mapping[str, str]
) -> tuple[list[Score], dict[str, str]]:
    """The scores with those of an evaluation.json before them that still hold, and the keys of all
    their models.
    """
    found = read_object(path)
    before, rows = (found.get(name) for name in ("keys", "scores"))
    known = (
        {name: key for name, key in before.items() if key in keys.values()}
        if isinstance(before, dict)
        else {}
    )
    old = [
        score
        for score in map(_score, rows if isinstance(rows, list) else ())
        if score and score.model in known
    ]
    place = lambda score: (score.model, score.task, score.length)
    # one measured again stays in its place
    every = {place(score): score for score in [*old, *scores]}
    return list(every.values()), known | dict(keys)


def _score(row) -> Score | None:
    """A score as `write` leaves it; None for anything else."""
    number = lambda value: value is None or isinstance(value, (int, float)) and abs(value) < 1e300
    groups = row.get("groups") if isinstance(row, dict) else None
    if not isinstance(groups, dict) or not all(map(number, [row.get("score"), *groups.values()])):
        return None
    if not all(type(row.get(name)) is str for name in ("model", "task")):
        return None
    if not all(
        type(row.get(name)) is int and 0 <= row[name] < 2**63 for name in ("length", "samples")
    ):
        return None
    value = lambda number: math.nan if number is None else float(number)
    return Score(
        row["model"],
        row["task"],
        row["length"],
        value(row["score"]),
        row["samples"],
        {name: value(each) for name, each in groups.items()},
        str(row.get("texts", "")),
    )


def file_name(model: str) -> str:
    """The name of a model as part of that of a file."""
    return re.sub(r"\W+", "-", model.lower()).strip("-")


def markdown(made: dict) -> str:
    line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    rule = "|---|---|" + "---:|" * (len(made["columns"]) - 2) + "\n"
    return (
        line(made["columns"]) + rule + "".join(map(line, made["rows"])) + f"\n{made['caption']}\n"
    )


def _shown(score: float, decimals: int) -> str:
    return MISSING if math.isnan(score) else f"{score:,.{decimals}f}"


def _number(score: float) -> float | None:
    return score if math.isfinite(score) else None
