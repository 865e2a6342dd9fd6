"""What the file of a tokenizer can ask for without saying so: memory that no text needs."""

import json

from lljax.errors import ModelError

MOST_IDS = 1 << 22  # of a larger vocabulary nobody has heard
MOST_GROWTH = 32  # characters made of one; NFKC makes 18


def check(path: str, tokenizer) -> None:
    """Refuses a tokenizer that makes texts longer out of proportion, which would end the process
    for want of memory.

    Raises:
      ModelError: with `path` and the bound.
    """
    for part in (tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.decoder):
        grows = 1 if part is None else growth(json.loads(part.__getstate__()))
        if grows > MOST_GROWTH:
            raise ModelError(
                f"{path}: {type(part).__name__} of tokenizer.json makes a text up to "
                f"{grows:,.0f} times longer; at most {MOST_GROWTH} times is read"
            )


def serialized(tokenizer) -> str:
    """All that makes a tokenizer, for its fingerprint. Of a vocabulary with an id beyond MOST_IDS,
    its tokens and ids alone: the library would write something for every id up to that."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < MOST_IDS:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(sorted(vocabulary.items()))


def growth(part: dict) -> float:
    """How many characters a normalizer or decoder of tokenizer.json may make of one, by Replace."""
    grows = 1.0
    for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
        grows *= growth(inner)
    if part.get("type") == "Replace":
        matched = len(part["pattern"].get("String", "")) or 1  # a regular expression: one or more
        grows *= max(1.0, len(part["content"]) / matched)
    return grows
