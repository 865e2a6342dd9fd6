"""Passkey retrieval: a number hidden in the noise of Landmark attention (Mohtashami & Jaggi 2023,
arXiv 2305.16300).

passkey/longlora: LongLoRA's passkey_retrivial.py to the letter: garbage counted in characters, its
  seeds, and as many new tokens as the key has, all of which must be right.
passkey/landmark: the same prompt; the first number in ten new tokens counts.
passkey/tokens: LongLoRA's, with a text that fills `length` for any tokenizer.

Counted in characters, a text may exceed `length`: by 1% with Llama's tokenizer, by half with a
tokenizer for code.
"""

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from lljax.evaluation import haystack
from lljax.evaluation.fitting import TokenCounter, largest
from lljax.evaluation.metrics import first_number
from lljax.evaluation.task import Example, Task, TooShort, mean

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
PREFIX = " The pass key is"
CHARACTERS = 3.75  # of garbage per token, as in LongLoRA
SAMPLES = {"longlora": 10, "landmark": 50, "tokens": 10}  # the authors'; seeds are 0, 1, 2 ...


def tasks() -> dict[str, Task]:
    """The three tasks by name."""
    return {
        f"passkey/{name}": Task(
            name=f"passkey/{name}",
            examples=functools.partial(_examples, name),
            score=mean(grade),
            generated=True,
        )
        for name, grade in (("longlora", same), ("landmark", first_number), ("tokens", same))
    }


def same(prediction: str, example: Example) -> float:
    return float(prediction.strip() == example.answers[0])


def _examples(
    name: str, tokenizer: Any, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    counter, n = TokenCounter(tokenizer), 1
    before = len(counter.ids(PREFIX))
    for i in range(seed, seed + (SAMPLES[name] if samples is None else samples)):
        if name == "tokens":
            lines, key, n = _filled(counter, length, i, n)
        else:
            lines, key = landmark_text(length, i)
        tokens = 10 if name == "landmark" else len(counter.ids(f"{PREFIX} {key}")) - before
        yield Example(
            id=str(i),
            prompt="\n".join([*lines, QUESTION]),
            answers=(key,),
            tokens=tokens,
            answer_prefix=PREFIX,
        )


def landmark_text(length: int, seed: int) -> tuple[list[str], str]:
    """LongLoRA's lines for `length` tokens, and the key, from the same NumPy generator.

    Raises:
      TooShort: the garbage rounds down to nothing.
    """
    garbage = int(CHARACTERS * length // 1024 * 1024)
    if not garbage:
        raise TooShort(
            f"passkey: at {length} tokens LongLoRA's rule leaves no garbage: use --lengths of 274 "
            "or more, or passkey/tokens"
        )
    rng = np.random.RandomState(seed)
    before = rng.randint(0, garbage)
    key = str(rng.randint(1, 50_000))
    # Five sentences with their spaces are 90 characters.
    text = " ".join(haystack.noise(garbage // 17 + 1))
    return [TASK, text[:before], KEY.format(key=key), text[: garbage - before]], key


def _filled(
    counter: TokenCounter, length: int, seed: int, guess: int
) -> tuple[list[str], str, int]:
    """The lines and the key of passkey/tokens, and the number of sentences that fills `length`."""

    def lines(n: int) -> tuple[list[str], str]:
        rng = random.Random(f"{seed} passkey {length}")
        key, sentences = str(rng.randint(1, 50_000)), rng.random()
        before = round(sentences * n)
        return [
            TASK,
            " ".join(haystack.noise(before)),
            KEY.format(key=key),
            " ".join(haystack.noise(n - before)),
        ], key

    def size(n: int) -> int:
        text, key = lines(n)
        return counter("\n".join([*text, QUESTION + PREFIX + " " + key]))

    n = largest(size, length, least=1, guess=guess)
    if n is None:
        raise TooShort(
            f"passkey/tokens: task, key and question take {size(1)} of {length} tokens: use longer "
            "--lengths"
        )
    return *lines(n), n
