"""A prompt while it is read, the requests that have it, and the sizes that it is read in."""

import dataclasses
from collections.abc import Sequence

from lljax.generation.completion import Growing, Request
from lljax.generation.prefixes import Key
from lljax.models.cache import Cache
from lljax.models.rope import KINDS
from lljax.models.spec import DecoderSpec
from lljax.parallel.rounding import cdiv

CHUNK = 512  # prompt tokens in a forward pass: bounds its memory, and how long others wait for it
PIECES = (16, 4, 1)  # a prompt ends in a piece of so many tokens at most: CHUNK divided by these


def piece_sizes(chunk: int) -> list[int]:
    """The sizes in which a prompt is read, ascending."""
    return [max(1, chunk // piece) for piece in PIECES]


def cache_slots(tokens: int, chunk: int) -> int:
    """Slots of a cache that holds `tokens`."""
    return chunk << (cdiv(tokens, chunk) - 1).bit_length()


def rope_length(spec: DecoderSpec, request: Request) -> int:
    """Tokens that the request may reach, so that cached keys stay valid; 0 if no RoPE depends on
    it.
    """
    by_length = any(KINDS[rope.type].by_length for rope in spec.ropes)
    return len(request.prompt) + request.tokens if by_length else 0


@dataclasses.dataclass
class Reading:
    """A prompt while it is read. growing: the requests that have it, which are alike but for their
    sampling and their ends. keys: of its chunks. start: tokens read.
    """

    growing: list[Growing]
    cache: Cache
    keys: list[Key]
    rope_length: int
    start: int = 0

    @property
    def request(self) -> Request:
        return self.growing[0].request

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def left(self) -> int:
        return len(self.prompt) - self.start

    def serves(self, request: Request, rope_length: int) -> bool:
        """Whether `request` has this prompt, so that reading it again would give the same."""
        mine = self.request
        return (
            not (mine.prompt_logprobs or request.prompt_logprobs)
            and (mine.adapter, self.rope_length) == (request.adapter, rope_length)
            and list(mine.prompt) == list(request.prompt)
        )
