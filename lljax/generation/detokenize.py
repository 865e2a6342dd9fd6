"""Incremental detokenization, in time linear in the number of tokens."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders show it for bytes of an incomplete character
LONGEST = 32  # tokens of an incomplete character; longer sequences are no text


class Detokenizer:
    """Turns tokens into text one at a time.

    The results of `add` and `finish` together are the tokenizer's decoding of all tokens at once,
    up to a stop string. (Next to bytes that are not UTF-8, characters may be kept that decoding at
    once loses.)

    Each call decodes only the tokens not shown yet, after the tokens shown last as context: a
    decoder drops a space at the beginning of its input.

    stop_strings: the text ends before the first of them, wherever token boundaries are; a possible
      beginning of a stop string is held back.
    """

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), *, skip_special_tokens: bool = False
    ):
        added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
        self._skipped = frozenset(id for id, token in added if token.special)
        self._tokenizer = tokenizer
        self._stop_strings = tuple(string for string in stop_strings if string)
        self._context: list[int] = []
        self._waiting: list[int] = []
        self._held = ""
        self.ended = False  # by a stop string

    def add(self, token: int) -> str:
        """The text that is certain with this token; it may be empty, and is after a stop string."""
        if self.ended or token in self._skipped:
            return ""
        self._waiting.append(token)
        whole = self._decode(self._context + self._waiting)
        if whole.endswith(UNFINISHED) and len(self._waiting) < LONGEST:
            return ""
        return self._certain(self._take(whole))

    def finish(self) -> str:
        """The rest of the text, up to a stop string: an incomplete character and held-back text."""
        if self.ended:
            return ""
        text = self._certain(self._take(self._decode(self._context + self._waiting)))
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _take(self, whole: str) -> str:
        """The text of the waiting tokens, which become the context of the next ones."""
        before = self._decode(self._context)
        # If tokens are bytes, an invalid one may change the text before it; decoded alone, it does
        # not.
        text = whole[len(before) :] if whole.startswith(before) else self._decode(self._waiting)
        self._context, self._waiting = self._waiting or self._context, []
        return text

    def _certain(self, text: str) -> str:
        """Text that is no part of a stop string; holds back the beginning of one."""
        text = self._held + text
        stops = [place for place in map(text.find, self._stop_strings) if place >= 0]
        if stops:
            self.ended, self._held = True, ""
            return text[: min(stops)]
        beginnings = (
            n
            for string in self._stop_strings
            for n in range(1, len(string))
            if text.endswith(string[:n])
        )
        held = max(beginnings, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
