"""KeyChain: a question at the end of a chain of keys, about one of several facts in a long text.

LoongRL, arXiv 2510.19363: UUIDs are scattered over a document; each leads to another one, and the
chain that begins at a given key ends in the true question. The other chains end in false ones. Here
the questions are about numbers hidden in the same text, so that the task needs no data set, and
the keys are eight hexadecimal digits: a UUID takes about 25 tokens, and documents of 1,024 tokens
would have no room.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lljax.evaluation import haystack
from lljax.evaluation.fitting import TokenCounter, largest
from lljax.evaluation.metrics import matches_all
from lljax.evaluation.needle import NAMES
from lljax.evaluation.task import Example, Task, TooShort, mean

SAMPLES = 50  # for a task and length
HOPS = (2, 4)  # sentences from the first key to the question: the tasks
CHAINS = 4  # one of them with the true question
TOKENS = 32  # new tokens
FACT = "The special number of {name} is {number}."
LINK = "The key {key} leads to the key {other}."
END = "The key {key} leads to the question: {question}"
QUESTION = "What is the special number of {name}?"
PROMPT = (
    "Keys, questions and special numbers are hidden within the following text. Every key leads to "
    "another key or to a question.\n\n{context}\n\nStart at the key {start} and follow the keys "
    "until you reach a question. Only this question counts. Answer it from the text above."
)
PREFIX = " The answer to the question at the end of the chain is"


@dataclasses.dataclass(frozen=True)
class KeyChain:
    """The sentences to hide, in random order; the first key; the true number and the false ones."""

    lines: tuple[str, ...]
    start: str
    answer: str
    false: tuple[str, ...]


def tasks(text: Path | None = None) -> dict[str, Task]:
    """keychain/2 and keychain/4, by the number of hops, in the words of a file or of Python's
    language reference.
    """
    return {f"keychain/{hops}": task(hops, CHAINS, text, f"keychain/{hops}") for hops in HOPS}


def task(hops: int, chains: int, text: Path | None, name: str) -> Task:
    """KeyChain with `chains` chains, at most one for each of needle.NAMES, of `hops` sentences."""
    return Task(
        name=name,
        examples=functools.partial(_examples, name, hops, chains, text),
        score=mean(lambda prediction, example: matches_all(prediction, example.answers)),
        generated=True,
    )


def key_chain(rng: random.Random, hops: int, chains: int) -> KeyChain:
    keys = [f"{key:08x}" for key in rng.sample(range(16**8), hops * chains)]
    names = rng.sample(NAMES, chains)
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), chains)]
    lines = [
        FACT.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)
    ]
    for i, name in enumerate(names):
        chain = keys[i * hops : (i + 1) * hops]
        lines += [LINK.format(key=a, other=b) for a, b in itertools.pairwise(chain)]
        lines.append(END.format(key=chain[-1], question=QUESTION.format(name=name)))
    rng.shuffle(lines)
    return KeyChain(tuple(lines), keys[0], numbers[0], tuple(numbers[1:]))


def _examples(
    name: str,
    hops: int,
    chains: int,
    text: Path | None,
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
) -> Iterator[Example]:
    counter, words, n = TokenCounter(tokenizer), haystack.prose(text), 1
    for i in range(SAMPLES if samples is None else samples):
        rng = random.Random(f"{seed} {name} {length} {i}")
        hidden = key_chain(rng, hops, chains)
        depths = sorted(rng.random() for _ in hidden.lines)

        def prompt(n: int, hidden=hidden, depths=depths) -> str:
            context = _scattered(haystack.first_words(words, n), hidden.lines, depths)
            return PROMPT.format(context=context, start=hidden.start)

        size = lambda n, prompt=prompt: counter(prompt(n) + PREFIX) + TOKENS
        n = largest(size, length, least=1, guess=n)
        if n is None:
            raise TooShort(
                f"{name}: {len(hidden.lines)} hidden sentences, the question and {TOKENS} new "
                f"tokens take {size(1)} of {length} tokens: use longer --lengths"
            )
        yield Example(
            id=str(i),
            prompt=prompt(n),
            answers=(hidden.answer,),
            tokens=TOKENS,
            answer_prefix=PREFIX,
            distractors=hidden.false,
        )


def _scattered(text: str, lines: tuple[str, ...], depths: list[float]) -> str:
    """Inserts each line at its depth, from 0 to 1, between two sentences of the text."""
    parts = haystack.sentences(text)
    places = [0, *(round(depth * len(parts)) for depth in depths), len(parts)]
    between = [" ".join(parts[start:stop]) for start, stop in itertools.pairwise(places)]
    return " ".join(
        filter(None, itertools.chain.from_iterable(itertools.zip_longest(between, lines)))
    )
