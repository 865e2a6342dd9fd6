"""Bounds on the memory that the file of a tokenizer may make a reader take."""

import json
from typing import Any

from lljax.errors import ModelError

MOST_IDS = 1 << 22  # the largest vocabularies have 2 ** 18
MOST_GROWTH = 32  # characters from one; NFKC makes 18


def check(path: str, tokenizer: Any) -> None:
    """Refuses a tokenizer that makes a text so long that the process could run out of memory.

    Raises:
      ModelError: it does; the message names `path` and the bound.
    """
    for part in (tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.decoder):
        grows = 1 if part is None else growth(json.loads(part.__getstate__()))
        if grows > MOST_GROWTH:
            raise ModelError(
                f"{path}: {type(part).__name__} of tokenizer.json makes a text up to "
                f"{grows:,.0f} times longer; at most {MOST_GROWTH} times is read"
            )


def serialized(tokenizer: Any) -> str:
    """The definition of a tokenizer, for its fingerprint.

    For a vocabulary with an id beyond MOST_IDS, its tokens and ids alone: the library would write
    something for every id up to that.
    """
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < MOST_IDS:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(sorted(vocabulary.items()))


def growth(part: dict) -> float:
    """The largest number of characters that a normalizer or decoder of tokenizer.json may make from
    one, by Replace.
    """
    grows = 1.0
    for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
        grows *= growth(inner)
    if part.get("type") == "Replace":
        matched = len(part["pattern"].get("String", "")) or 1  # a regular expression: one or more
        grows *= max(1.0, len(part["content"]) / matched)
    return grows
