"""Answers the examples of tasks with a model, in batches, and scores them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from lljax.data.prompt_tokens import chat_tokens, text_tokens
from lljax.errors import ConfigError
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.scores import Score
from lljax.evaluation.task import FIRST_TRAINING_SEED, Example, Task, TooShort, group_scores
from lljax.generation.completion import Request
from lljax.generation.engine import Engine
from lljax.models.cache import cache_bytes
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout
from lljax.report.numbers import short_length

Progress = Callable[[Iterable, str], Iterable]


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """How models are asked, with greedy decoding.

    samples, seed: see `Task.examples`. chat: through the chat template, unless an example excludes
      it. stop: tokens that end an answer. rows: examples in a batch. cache_dtype: see `generate`.
    """

    tokenizer: Any
    samples: int | None = None
    seed: int = 0
    chat: bool = False
    stop: frozenset[int] = frozenset()
    rows: int = 4
    cache_dtype: Any = None

    def __post_init__(self):
        if self.seed >= FIRST_TRAINING_SEED:
            raise ConfigError(
                f"seed={self.seed}: seeds from {FIRST_TRAINING_SEED:,} on make training rows "
                "(lljax data tasks): use a smaller one"
            )

    def examples(self, task: Task, length: int) -> Iterator[Example]:
        """The examples of a task whose prompts, chat template included, fit `length`."""
        template = Example(id="", prompt="a", answers=(), tokens=0)
        room = len(self.tokens(template)) - 1 if self.chat else 0
        return task.examples(self.tokenizer, length - room, self.samples, self.seed)

    def tokens(self, example: Example) -> list[int]:
        """The prompt's tokens."""
        if self.chat and example.chat:
            messages = [{"role": "user", "content": example.prompt}]
            return chat_tokens(self.tokenizer, messages, example.answer_prefix)
        return text_tokens(self.tokenizer, example.text)


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model under evaluation.

    name: in the scores. key: its identity in `Predictions`. dtype, layout: see `generate`.
    """

    model: Decoder
    name: str
    key: str
    dtype: Any = jnp.float32
    layout: Layout | None = None


def too_short(
    tasks: Iterable[Task], lengths: Sequence[int], settings: EvalSettings
) -> dict[tuple[str, int], str]:
    """The reason, by task and length, why a task does not fit a length.

    Makes the first example of every task and length, so that mistakes show before a model is
    loaded. Raises the errors of `Task.examples`, except TooShort.
    """
    reasons = {}
    for task in tasks:
        for length in lengths:
            try:
                next(settings.examples(task, length), None)
            except TooShort as error:
                reasons[task.name, length] = str(error)
    return reasons


def score_tasks(
    evaluated: EvalModel,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    settings: EvalSettings,
    predictions: Predictions,
    *,
    progress: Progress = lambda items, title: items,
) -> Iterator[Score]:
    """The score of every task at every length; NaN if the length is too short for the task.

    Answers that `predictions` holds are not generated again; new ones are added to it.
    progress(iterable, title) may wrap the iteration over examples.
    """
    for task in tasks:
        for length in lengths:
            title = f"{evaluated.name}: {task.name} at {short_length(length)}"
            source = progress(settings.examples(task, length), title)
            try:
                answered = _Answers(evaluated, task.name, length, settings, predictions)
                answered.answer(source)
            except TooShort:
                yield Score(evaluated.name, task.name, length, math.nan, 0)
                continue
            examples = answered.examples
            texts = [answered.texts[example.id] for example in examples]
            yield Score(
                model=evaluated.name,
                task=task.name,
                length=length,
                score=task.score(texts, examples),
                samples=len(examples),
                groups=group_scores(task, texts, examples),
            )


class _Answers:
    """The examples of a task at a length, without their prompts, and the answers by their id."""

    def __init__(
        self,
        evaluated: EvalModel,
        task: str,
        length: int,
        settings: EvalSettings,
        predictions: Predictions,
    ):
        self.evaluated, self.settings, self.predictions = evaluated, settings, predictions
        self.place = evaluated.key, task, length
        cache_dtype = settings.cache_dtype or evaluated.dtype
        self.engine = Engine(
            evaluated.model,
            rows=settings.rows,
            cache_dtype=cache_dtype,
            dtype=evaluated.dtype,
            # for a document that several examples ask about
            prefix_bytes=cache_bytes(evaluated.model.spec, length, cache_dtype),
            layout=evaluated.layout,
        )
        self.examples: list[Example] = []
        self.texts: dict[str, str] = {}

    def answer(self, source: Iterable[Example]) -> None:
        waiting: list[Example] = []
        for example in source:
            # Scores do not need the prompt, and it is long.
            self.examples.append(dataclasses.replace(example, prompt=""))
            known = self.predictions.find(*self.place, example)
            if known is None:
                waiting.append(example)
            else:
                self.texts[example.id] = known
            if len(waiting) == self.settings.rows:
                self._generate(waiting)
                waiting = []
        if waiting:
            self._generate(waiting)

    def _generate(self, batch: Sequence[Example]) -> None:
        settings = self.settings
        completions = self.engine.run(
            Request(settings.tokens(example), example.tokens, stop=settings.stop)
            for example in batch
        )
        for example, completion in zip(batch, completions, strict=True):
            text = settings.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            self.texts[example.id] = text
            self.predictions.add(*self.place, example, text)
