"""Log-probabilities in OpenAI's two shapes."""

import functools
from collections.abc import Sequence
from typing import Any

from lljax.generation.completion import Logprobs

LOWEST = -9999.0  # for probability 0, whose logarithm JSON cannot write


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._bytes = _byte_alphabet()
        self._byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  it lives as long as the server
    def text(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019
    def bytes(self, token: int) -> list[int]:
        """The bytes of a token, which may be part of a character."""
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        if spelled is None:  # the model has more rows than the tokenizer has tokens
            return []
        if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            return [int(spelled[3:5], 16)]
        if self._byte_level and all(c in self._bytes for c in spelled):
            return [self._bytes[c] for c in spelled]
        return list(self.text(token).encode())

    def key(self, token: int) -> str:
        """The text of a token; for a part of a character its bytes, as OpenAI spells them, so that
        two tokens have two keys.
        """
        text = self.text(token)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


def chat_logprobs(texts: TokenTexts, token: int, scored: Logprobs, top: int) -> dict:
    """An entry of `logprobs.content` in a chat completion."""
    entry = _entry(texts, token, scored.logprob)
    likely = [_entry(texts, other, logprob) for other, logprob in scored.top[:top]]
    return entry | {"top_logprobs": likely}


def _finite(logprob: float) -> float:
    """JSON has neither -inf nor NaN, which damaged weights give."""
    return logprob if logprob > LOWEST else LOWEST


def _entry(texts: TokenTexts, token: int, logprob: float) -> dict:
    return {
        "token": texts.text(token),
        "logprob": _finite(logprob),
        "bytes": texts.bytes(token),
    }


def text_logprobs(
    texts: TokenTexts,
    tokens: Sequence[int],
    scored: Sequence[Logprobs | None],
    offsets: Sequence[int],
    top: int,
) -> dict[str, list]:
    """`logprobs` of a text completion. scored: None for the first token of a prompt, which nothing
    predicts. offsets: of each token in the text.

    The token itself is among its `top_logprobs` even if it is none of the `top` most likely.
    """
    likely: list[dict | None] = []
    for token, row in zip(tokens, scored, strict=True):
        if row is None:
            likely.append(None)
            continue
        best = {texts.key(other): _finite(logprob) for other, logprob in row.top[:top]}
        likely.append(best | {texts.key(token): _finite(row.logprob)})
    return {
        "tokens": [texts.key(token) for token in tokens],
        "token_logprobs": [None if row is None else _finite(row.logprob) for row in scored],
        "top_logprobs": likely,
        "text_offset": list(offsets),
    }


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
