"""A request to continue a prompt, and the completion while it grows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from lljax.generation.detokenize import Detokenizer
from lljax.generation.sample import GREEDY, Sampling

Reason = Literal["stop", "length", "cancelled"]


class Constraint(Protocol):
    """What a grammar allows; belongs to one request."""

    def allowed(self) -> np.ndarray:
        """Bool [V]: the tokens that may come next, at least one."""
        ...

    def accept(self, token: int) -> None:
        """Goes on after a token."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt: token ids, at least one. tokens: written at most.
    numbers: folded into the random numbers, besides the seed of `sampling`; requests that share
      their seed differ by them.
    stop: tokens that end the completion. stop_strings: strings that end it and are cut off.
    logprobs: whether to return log-probabilities of the new tokens; prompt_logprobs: of the
      prompt's tokens, all but the first, each given those before it.
    adapter: its name; None for the model as it is.
    constraint: which tokens may come next; None for all.
    """

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = GREEDY
    numbers: tuple[int, ...] = ()
    stop: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    prompt_logprobs: bool = False
    adapter: str | None = None
    constraint: Constraint | None = None


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Of one token, before temperature and filters. top: the `MOST_LIKELY` most likely tokens with
    theirs, the most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one more token adds. token: None if the completion ended without one, by a stop token or
    a cancellation. text: what has become certain, "" without a tokenizer. reason: why it is the
    last piece; None before.
    """

    token: int | None
    text: str
    logprobs: Logprobs | None = None
    reason: Reason | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """tokens: the new ones, without the stop token. text: their text, without the stop string; None
    without a tokenizer. reason: "stop" by a stop token or stop string, "length" by the limit,
    "cancelled". stop_token: the stop token that ended it; None if none did.
    """

    tokens: list[int]
    text: str | None
    reason: Reason
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    stop_token: int | None = None

    @property
    def ended(self) -> bool:
        """By a stop token or stop string, not by the limit."""
        return self.reason == "stop"


class Growing:
    """The completion of a request while it grows.

    tokenizer: None for tokens alone. heard: called with every piece.
    reused: tokens of the prompt that were known from requests before; final before the first piece.
    """

    def __init__(self, request: Request, tokenizer: Any, heard: Callable[[Piece], None] | None):
        self.request = request
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.stop_token: int | None = None
        self.reused = 0
        self.prompt_logprobs: list[Logprobs] = []  # complete before the first piece
        self._logprobs: list[Logprobs] = []
        self._pieces: list[str] = []
        self._heard = heard
        self._text = None
        if tokenizer is not None:
            self._text = Detokenizer(tokenizer, request.stop_strings, skip_special_tokens=True)

    def add(self, token: int, logprobs: Logprobs | None) -> None:
        """One more token. Sets `reason` if it ends the completion."""
        if token in self.request.stop:
            self.stop_token = token
            return self.end("stop")
        self.tokens.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        text = "" if self._text is None else self._text.add(token)
        reason: Reason | None = "length" if len(self.tokens) == self.request.tokens else None
        if self._text is not None:
            if reason and not self._text.ended:
                text += self._text.finish()
            reason = "stop" if self._text.ended else reason
        self._say(Piece(token, text, logprobs, reason))

    def end(self, reason: Reason) -> None:
        """Ends it without another token."""
        text = "" if self._text is None else self._text.finish()
        if self._text is not None and self._text.ended and reason != "cancelled":
            reason = "stop"
        self._say(Piece(None, text, None, reason))

    def completion(self) -> Completion:
        """What has grown, once it has ended."""
        assert self.reason is not None, "it has not ended"
        return Completion(
            tokens=self.tokens,
            text=None if self._text is None else "".join(self._pieces),
            reason=self.reason,
            logprobs=self._logprobs if self.request.logprobs else None,
            prompt_logprobs=self.prompt_logprobs if self.request.prompt_logprobs else None,
            stop_token=self.stop_token,
        )

    def _say(self, piece: Piece) -> None:
        self._pieces.append(piece.text)
        self.reason = piece.reason
        if self._heard is not None:
            self._heard(piece)
