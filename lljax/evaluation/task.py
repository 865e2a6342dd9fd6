"""A task of a benchmark: examples for a model to answer, and a score of its answers."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lljax.errors import ConfigError

FIRST_TRAINING_SEED = 1 << 30  # seeds from here on make training rows: lljax/cli/make_rows.py
FAR = 16  # longest length to evaluate, as a multiple of the model's context


class TooShort(ConfigError):
    """The fixed parts of a task do not fit the length; other tasks and lengths may."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    id: unique within task and length, and the same in every run. prompt: the user's message.
    answer_prefix: the beginning of the answer: a base model reads it after the prompt, a chat model
      as the start of its reply.
    answers: the correct ones. tokens: new tokens, at most. chat: a chat model is asked through its
      template.
    groups: names of subsets that are scored separately too. classes: the choices of a
      classification.
    distractors: wrong answers of the same kind that stand in the prompt too. separator: between
      several answers.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    tokens: int
    answer_prefix: str = ""
    chat: bool = True
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    distractors: tuple[str, ...] = ()
    separator: str = ", "

    @property
    def text(self) -> str:
        """The prompt of a base model."""
        return self.prompt + self.answer_prefix


@dataclasses.dataclass(frozen=True)
class Task:
    """A named source of examples and their score.

    examples(tokenizer, length, samples, seed): generated examples, or the first `samples` of a file
      (None: all). bos, prompt, answer prefix and new tokens fit `length`; the caller subtracts the
      tokens of a chat template. Raises at the first example: TooShort; ConfigError if a file is not
      named; DataError if a file is damaged.
    score(predictions, examples): 0 to 100, NaN if nothing can be scored.
    generated: another seed gives other examples. per_sample: examples for each of `samples`.
    """

    name: str
    examples: Callable[[Any, int, int | None, int], Iterator[Example]]
    score: Callable[[Sequence[str], Sequence[Example]], float]
    generated: bool = False
    per_sample: int = 1


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files of the benchmarks, each named by the flag of its field.

    haystack: a text to hide needles in, instead of Python's language reference.
    squad, hotpotqa: files of RULER's qa_1 and qa_2.
    longbench, zeroscrolls: folders. longbench_config: the folder of LongBench's prompts if it is
      another. longbench2: its file.
    """

    haystack: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    longbench: Path | None = None
    longbench_config: Path | None = None
    longbench2: Path | None = None
    zeroscrolls: Path | None = None


def refuse_beyond(length: int, context: int, field: str) -> None:
    """Raises ConfigError if `length`, a value of `field`, exceeds FAR times the model's context."""
    if length > FAR * context:
        raise ConfigError(
            f"{field}: {length:,} tokens are more than {FAR} times the model's context of "
            f"{context:,}"
        )


def mean(
    grade: Callable[[str, Example], float],
) -> Callable[[Sequence[str], Sequence[Example]], float]:
    """A score: the mean over examples of a grade from 0 to 1, in percent."""

    def score(predictions: Sequence[str], examples: Sequence[Example]) -> float:
        grades = [
            grade(prediction, example)
            for prediction, example in zip(predictions, examples, strict=True)
        ]
        return 100 * sum(grades) / len(grades) if grades else math.nan

    return score


def group_scores(
    task: Task, predictions: Sequence[str], examples: Sequence[Example]
) -> dict[str, float]:
    """The score of each group of examples, in the order of appearance."""
    members: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        for group in example.groups:
            members.setdefault(group, []).append(i)
    return {
        group: task.score([predictions[i] for i in at], [examples[i] for i in at])
        for group, at in members.items()
    }
