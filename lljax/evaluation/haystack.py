"""Text to hide things in, and words to hide: what a benchmark made on the spot is made of."""

import functools
import importlib.resources
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
    """The words of a text file; without one, of Python's own language reference, which every Python
    carries.

    Raises:
      DataError: the file cannot be read, or holds no words.
      ConfigError: this Python was packed without its reference.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ConfigError(
                "this Python has no pydoc_data to hide needles in: name a text file with --haystack"
            ) from None
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        if path.exists() and not path.is_file():  # a device never ends
            raise DataError(f"{path}: the haystack is not a regular file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path}: the haystack cannot be read ({error})") from None
    # no rulers of asterisks
    found = tuple(word for word in text.split() if any(map(str.isalnum, word)))
    if not found:
        raise DataError(f"{path}: the haystack holds no words")
    return found


def first_words(words: tuple[str, ...], n: int) -> str:
    """The first n words as one line, from the start again where there are fewer."""
    return " ".join((words * -(-n // len(words)))[:n])


def sentences(text: str) -> list[str]:
    return SENTENCE_END.split(text)


def noise(n: int) -> list[str]:
    """The first n sentences of the noise, as lines of five."""
    line = " ".join(NOISE)
    return [line] * (n // len(NOISE)) + (
        [" ".join(NOISE[: n % len(NOISE)])] if n % len(NOISE) else []
    )


@functools.lru_cache
def words(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs (`noun` ...) of wonderwords, whose lists RULER draws from."""
    try:
        folder = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        raise ConfigError(
            "the words of RULER's haystacks are missing: pip install 'lljax[ruler]'"
        ) from None
    text = folder.joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines()} - {""}))


@functools.lru_cache
def all_words() -> tuple[str, ...]:
    return tuple(sorted({*words("noun"), *words("adjective"), *words("verb")}))


def compounds(rng, n: int) -> list[str]:
    """n different words of the form adjective-noun."""
    adjectives, nouns = words("adjective"), words("noun")
    return [
        f"{adjectives[i // len(nouns)]}-{nouns[i % len(nouns)]}"
        for i in rng.sample(range(len(adjectives) * len(nouns)), n)
    ]
