"""A model answers the examples of tasks, and is scored."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.evaluation.results import Predictions, Score
from lljax.evaluation.task import Example, Task, TooShort, group_scores
from lljax.generation.generate import generate
from lljax.generation.prompt import chat_tokens, text_tokens
from lljax.parallel.sharding import Layout
from lljax.report.numbers import short_length


@dataclasses.dataclass(frozen=True)
class Asking:
    """How models are asked, greedily.

    samples, seed: as `Task.examples` takes them. chat: through the chat template, but for examples
      that say no. stop: tokens that end an answer. rows: examples side by side. cache_dtype: as
      `generate` takes it.
    """

    tokenizer: object
    samples: int | None = None
    seed: int = 0
    chat: bool = False
    stop: frozenset[int] = frozenset()
    rows: int = 4
    cache_dtype: object = None

    def examples(self, task: Task, length: int) -> Iterator[Example]:
        """Those of a task whose questions, template included, fit `length`."""
        room = len(self.tokens(Example("", "a", (), 0))) - 1 if self.chat else 0
        return task.examples(self.tokenizer, length - room, self.samples, self.seed)

    def tokens(self, example: Example) -> list[int]:
        """What the model reads."""
        if self.chat and example.chat:
            return chat_tokens(
                self.tokenizer, [{"role": "user", "content": example.prompt}], example.answer_prefix
            )
        return text_tokens(self.tokenizer, example.text)


def too_short(
    tasks: Sequence[Task], lengths: Sequence[int], asking: Asking
) -> dict[tuple[str, int], str]:
    """Makes the first example of every task and length, so that mistakes show before a model is
    loaded.

    Returns by task and length why there can be none. Raises what `Task.examples` does.
    """
    reasons = {}
    for task in tasks:
        for length in lengths:
            try:
                next(asking.examples(task, length), None)
            except TooShort as error:
                reasons[task.name, length] = str(error)
    return reasons


def answer(
    model: nnx.Module,
    name: str,
    key: str,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    asking: Asking,
    made: Predictions,
    *,
    dtype=jnp.float32,
    layout: Layout | None = None,
    progress: Callable[[Iterable, str], Iterable] = lambda items, title: items,
) -> Iterator[Score]:
    """The score of every task at every length; NaN where the length is too short for it.

    name: of the model in the scores. key: in `made`, where what it answered before is found, and
      the rest is added.
    layout: as `generate` takes it. progress(iterable, title) may wrap the iteration over examples.
    """
    for task in tasks:
        for length in lengths:
            source = progress(
                asking.examples(task, length), f"{name}: {task.name} at {short_length(length)}"
            )
            try:
                examples, texts = _answers(
                    model,
                    (key, task.name, length),
                    source,
                    asking,
                    made,
                    dtype=dtype,
                    layout=layout,
                )
            except TooShort:
                yield Score(name, task.name, length, math.nan, 0)
                continue
            yield Score(
                name,
                task.name,
                length,
                task.score(texts, examples),
                len(examples),
                group_scores(task, texts, examples),
            )


def _answers(
    model,
    place: tuple[str, str, int],
    source: Iterable[Example],
    asking: Asking,
    made: Predictions,
    **how,
):
    """The examples, without their prompts, and what the model answered. place: of the answers in
    `made`.
    how: for `generate`.
    """
    examples, texts, waiting = [], {}, []

    def ask():
        prompts = [np.asarray(asking.tokens(example), np.int32) for example in waiting]
        done = generate(
            model,
            prompts,
            tokens=max(example.tokens for example in waiting),
            stop=asking.stop,
            rows=asking.rows,
            cache_dtype=asking.cache_dtype,
            **how,
        )
        for example, completion in zip(waiting, done):
            texts[example.id] = asking.tokenizer.decode(
                completion.tokens[: example.tokens], skip_special_tokens=True
            )
            made.add(*place, example, texts[example.id])
        waiting.clear()

    for example in source:
        # scores do not need it, and it is long
        examples.append(dataclasses.replace(example, prompt=""))
        known = made.find(*place, example)
        if known is None:
            waiting.append(example)
        else:
            texts[example.id] = known
        if len(waiting) == asking.rows:
            ask()
    if waiting:
        ask()
    return examples, [texts[example.id] for example in examples]
