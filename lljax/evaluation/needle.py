"""A needle in a haystack, over a grid of lengths and depths (after Kamradt 2023,
LLMTest_NeedleInAHaystack).

Every cell has its own random number to find: no judge is needed, and training data cannot hold it.
"""

import functools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lljax.evaluation import haystack
from lljax.evaluation.fitting import TokenCounter, largest
from lljax.evaluation.metrics import first_number
from lljax.evaluation.task import Example, Task, TooShort, mean

DEPTHS = tuple(range(0, 101, 10))  # percent of the haystack before the needle
NEEDLE = "The secret number of {name} is {number}."
QUESTION = (
    "Read the text and remember the secret number in it.\n\n{context}\n\n"
    "What is the secret number of {name}?"
)
PREFIX = " The secret number of {name} is"
TOKENS = 16  # new tokens: seven digits may be seven tokens
NAMES = (
    "Aberdeen",
    "Bergen",
    "Cordoba",
    "Dresden",
    "Espoo",
    "Florence",
    "Geneva",
    "Hobart",
    "Izmir",
    "Jaipur",
    "Kyoto",
    "Lisbon",
    "Mombasa",
    "Naples",
    "Oaxaca",
    "Porto",
    "Quito",
    "Rosario",
    "Salzburg",
    "Tampere",
)


def task(text: Path | None = None) -> Task:
    """The grid in the words of a file, or of Python's language reference.

    samples: for each depth, 1 by default.
    """
    return Task(
        name="needle",
        examples=functools.partial(_examples, text),
        score=mean(first_number),
        generated=True,
        per_sample=len(DEPTHS),
    )


def group(depth: int) -> str:
    """The group of a depth in `Example.groups`."""
    return f"depth {depth}%"


def grid(groups: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    """Scores [depths, lengths], shortest first, from {length: {group: score}}; NaN if missing."""
    return np.array(
        [
            [groups[length].get(group(depth), np.nan) for length in sorted(groups)]
            for depth in DEPTHS
        ]
    )


def _examples(
    text: Path | None, tokenizer: Any, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    counter, words, n = TokenCounter(tokenizer), haystack.prose(text), 1
    for depth in DEPTHS:
        for i in range(1 if samples is None else samples):
            rng = random.Random(f"{seed} needle {length} {depth} {i}")
            name, number = rng.choice(NAMES), str(rng.randrange(10**6, 10**7))
            prefix, needle = PREFIX.format(name=name), NEEDLE.format(name=name, number=number)

            def prompt(n: int, name=name, needle=needle, depth=depth) -> str:
                context = _hide(haystack.first_words(words, n), needle, depth)
                return QUESTION.format(name=name, context=context)

            size = lambda n, prompt=prompt, prefix=prefix: counter(prompt(n) + prefix) + TOKENS
            n = largest(size, length, least=1, guess=n)
            if n is None:
                raise TooShort(
                    f"needle: needle, question and {TOKENS} new tokens take {size(1)} of {length} "
                    "tokens: use longer --lengths"
                )
            yield Example(
                id=f"{depth}-{i}",
                prompt=prompt(n),
                answers=(number,),
                tokens=TOKENS,
                answer_prefix=prefix,
                groups=(group(depth),),
            )


def _hide(text: str, needle: str, depth: int) -> str:
    """Inserts `needle` after the last sentence within the first `depth` percent of the text."""
    if depth == 100:
        return f"{text} {needle}"
    end = 0
    for match in haystack.SENTENCE_END.finditer(text, 0, len(text) * depth // 100):
        end = match.end()
    return f"{text[:end]}{needle} {text[end:]}"
