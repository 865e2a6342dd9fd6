"""Text of tokens that come one at a time, in time that grows with their number."""

from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders show for bytes of an incomplete character
LONGEST = 32  # tokens that wait for one; beyond, they are no text


class Detokenizer:
    """What `add` returns and then `finish`, put together, is what the tokenizer decodes of all
    tokens at once, less what a stop string cuts off. (Beside bytes that are no UTF-8 it may keep
    characters that decoding at once loses.)

    Only the last few tokens are decoded at a time: those not shown yet, behind the ones shown last,
    since a decoder drops a space at the beginning of what it is given.

    stop_strings: the text ends before the first of them, wherever the tokens' borders are; what may
    be the beginning of one is held back.
    """

    def __init__(
        self, tokenizer, stop_strings: Sequence[str] = (), *, skip_special_tokens: bool = False
    ):
        added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
        self._skipped = frozenset(token for token, each in added if each.special)
        self._decode = lambda tokens: tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        self._stop_strings = tuple(string for string in stop_strings if string)
        self._context, self._waiting, self._held = [], [], ""
        self.ended = False  # by a stop string

    def add(self, token: int) -> str:
        """The text that the token makes certain: none yet, perhaps, and none after a stop
        string.
        """
        if self.ended or token in self._skipped:
            return ""
        self._waiting.append(token)
        whole = self._decode(self._context + self._waiting)
        if whole.endswith(UNFINISHED) and len(self._waiting) < LONGEST:
            return ""
        return self._certain(self._taken(whole))

    def finish(self) -> str:
        """The rest, up to a stop string: an unfinished character, and what began none after all."""
        if self.ended:
            return ""
        text = self._certain(self._taken(self._decode(self._context + self._waiting)))
        rest, self._held = self._held, ""
        return text + rest

    def _taken(self, whole: str) -> str:
        """The text of the waiting tokens, which become the context of the next."""
        before = self._decode(self._context)
        # Where bytes are tokens, a wrong one takes those before it along: decoded alone, it does
        # not.
        text = whole[len(before) :] if whole.startswith(before) else self._decode(self._waiting)
        self._context, self._waiting = self._waiting or self._context, []
        return text

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [at for at in map(text.find, self._stop_strings) if at >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        begun = (
            n
            for string in self._stop_strings
            for n in range(1, len(string))
            if text.endswith(string[:n])
        )
        held = max(begun, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
