"""What a task of a benchmark is: examples that a model answers, and a score from 0 to 100 of its
answers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lljax.errors import ConfigError

FAR = 16  # times what a model reads: how it fails beyond can be measured, up to here


class TooShort(ConfigError):
    """What a task always holds does not fit the length: the other tasks and lengths may go on."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    id: tells it from the others of its task and length, in every run the same. prompt: what a user
      would say.
    answer_prefix: how the answer begins: a base reads it after the prompt, a chat model as the
      start of its reply.
    answers: what is right. tokens: new ones, at most. chat: whether a chat model is asked through
      its template.
    groups: names under which it is scored apart as well. classes: what a classification chooses
      from.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    tokens: int
    answer_prefix: str = ""
    chat: bool = True
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a base reads."""
        return self.prompt + self.answer_prefix


@dataclasses.dataclass(frozen=True)
class Task:
    """examples(tokenizer, length, samples, seed): generated ones, or the first `samples` of a file
    (None: all of it).

    `length` holds bos, prompt, answer prefix and new tokens, in tokens. A chat template comes on
    top: who uses one asks for that much less. score(predictions, examples): 0 to 100, NaN where
    nothing can be scored.

    Raises, at the first example: TooShort. ConfigError: a file is not named. DataError: it is not
      what it should be.
    """

    name: str
    examples: Callable[[object, int, int | None, int], Iterator[Example]]
    score: Callable[[Sequence[str], Sequence[Example]], float]


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that the user names, each by the flag of its field.

    haystack: a text to hide needles in, for Python's own reference. squad, hotpotqa: of RULER's
      qa_1 and qa_2. longbench,
    zeroscrolls: folders. longbench_config: the folder of LongBench's prompts, where it is another.
      longbench2: its file.
    """

    haystack: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    longbench: Path | None = None
    longbench_config: Path | None = None
    longbench2: Path | None = None
    zeroscrolls: Path | None = None


def refuse_beyond(length: int, reads: int, field: str) -> None:
    """Raises ConfigError where `length` is far beyond the `reads` tokens that the model reads;
    `field` named it.
    """
    if length > FAR * reads:
        raise ConfigError(
            f"{field}: {length:,} tokens are more than {FAR} times the {reads:,} that the model reads"
        )


def mean(
    grade: Callable[[str, Example], float],
) -> Callable[[Sequence[str], Sequence[Example]], float]:
    """A score that is the mean over examples of a grade from 0 to 1."""

    def score(predictions, examples):
        grades = [
            grade(prediction, example)
            for prediction, example in zip(predictions, examples, strict=True)
        ]
        return 100 * sum(grades) / len(grades) if grades else math.nan

    return score


def group_scores(
    task: Task, predictions: Sequence[str], examples: Sequence[Example]
) -> dict[str, float]:
    """The score of each group's examples, in the order in which groups appear."""
    members: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        for group in example.groups:
            members.setdefault(group, []).append(i)
    return {
        group: task.score([predictions[i] for i in at], [examples[i] for i in at])
        for group, at in members.items()
    }
