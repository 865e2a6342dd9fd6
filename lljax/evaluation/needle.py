"""A needle in a haystack, over a grid of lengths and depths (after Kamradt 2023,
LLMTest_NeedleInAHaystack).

The needle holds a number of its own for every cell, so that no judge is needed and nothing was ever
read in training.
"""

import functools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lljax.evaluation import haystack
from lljax.evaluation.metrics import first_number
from lljax.evaluation.sizes import Counter, largest
from lljax.evaluation.task import Example, Task, TooShort, mean

DEPTHS = tuple(range(0, 101, 10))  # percent of the haystack before the needle
NEEDLE = "The secret number of {name} is {number}."
QUESTION = "Read the text and remember the secret number in it.\n\n{context}\n\nWhat is the secret number of {name}?"
PREFIX = " The secret number of {name} is"
TOKENS = 16  # written: seven digits, of which a tokenizer may make seven tokens
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
    """The grid in the words of a file; without one, of Python's own reference. samples: of each
    depth, one by default.
    """
    return Task("needle", functools.partial(_examples, text), mean(first_number))


def group(depth: int) -> str:
    """The name under which a depth is scored apart."""
    return f"depth {depth}%"


def grid(groups: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    """[depths, lengths], NaN where there is no score, from the group scores of every length,
    shortest first.
    """
    return np.array(
        [
            [groups[length].get(group(depth), np.nan) for length in sorted(groups)]
            for depth in DEPTHS
        ]
    )


def _examples(
    text: Path | None, tokenizer, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    counter, words, n = Counter(tokenizer), haystack.prose(text), 1
    for depth in DEPTHS:
        for i in range(1 if samples is None else samples):
            rng = random.Random(f"{seed} needle {length} {depth} {i}")
            name, number = rng.choice(NAMES), str(rng.randrange(10**6, 10**7))
            prefix, needle = PREFIX.format(name=name), NEEDLE.format(name=name, number=number)
            prompt = lambda n: QUESTION.format(
                name=name, context=_hide(haystack.first_words(words, n), needle, depth)
            )
            size = lambda n: counter(prompt(n) + prefix) + TOKENS
            n = largest(size, length, least=1, guess=n)
            if n is None:
                raise TooShort(
                    f"needle: needle, question and {TOKENS} new tokens take {size(1)} of {length} tokens: ask "
                    "for longer ones with --lengths"
                )
            yield Example(
                f"{depth}-{i}", prompt(n), (number,), TOKENS, prefix, groups=(group(depth),)
            )


def _hide(text: str, needle: str, depth: int) -> str:
    """`needle` after the last sentence that ends within `depth` percent of the text; at 100 after
    all of it.
    """
    if depth == 100:
        return f"{text} {needle}"
    ends = [
        0,
        *(
            found.end()
            for found in haystack.SENTENCE_END.finditer(text, 0, len(text) * depth // 100)
        ),
    ]
    return f"{text[: ends[-1]]}{needle} {text[ends[-1] :]}"
