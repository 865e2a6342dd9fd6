"""Haystacks and the words of needles, for benchmarks that are generated."""

import functools
import importlib.resources
import itertools
import random
import re
from pathlib import Path

from lljax.errors import ConfigError, DataError

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@functools.lru_cache(maxsize=4)
def prose(path: Path | None) -> tuple[str, ...]:
    """The words of a text file, or of the language reference that comes with Python.

    Raises:
      DataError: the file cannot be read, or holds no words.
      ConfigError: this Python comes without its reference.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ConfigError(
                "this Python has no pydoc_data, the default haystack: name a text file with "
                "--haystack"
            ) from None
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        if path.exists() and not path.is_file():  # a device never ends
            raise DataError(f"{path}: the haystack is not a regular file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path}: the haystack cannot be read ({error})") from None
    # Drops words without a letter or digit, such as rules of asterisks.
    words = tuple(word for word in text.split() if any(map(str.isalnum, word)))
    if not words:
        raise DataError(f"{path}: the haystack holds no words")
    return words


def first_words(words: tuple[str, ...], n: int) -> str:
    """The first n words as one line; repeats `words` if there are fewer."""
    return " ".join(itertools.islice(itertools.cycle(words), n))


def sentences(text: str) -> list[str]:
    return SENTENCE_END.split(text)


def noise(n: int) -> list[str]:
    """The first n sentences of the repeated noise, five to a line."""
    line = " ".join(NOISE)
    return [line] * (n // len(NOISE)) + (
        [" ".join(NOISE[: n % len(NOISE)])] if n % len(NOISE) else []
    )


@functools.lru_cache
def words(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs (kind "noun" ...) of wonderwords, RULER's word lists."""
    try:
        folder = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        raise ConfigError(
            "the words of RULER's haystacks are missing: pip install wonderwords"
        ) from None
    text = folder.joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines()} - {""}))


@functools.lru_cache
def all_words() -> tuple[str, ...]:
    return tuple(sorted({*words("noun"), *words("adjective"), *words("verb")}))


def compounds(rng: random.Random, n: int) -> list[str]:
    """n distinct words of the form adjective-noun."""
    adjectives, nouns = words("adjective"), words("noun")
    return [
        f"{adjectives[i // len(nouns)]}-{nouns[i % len(nouns)]}"
        for i in rng.sample(range(len(adjectives) * len(nouns)), n)
    ]
