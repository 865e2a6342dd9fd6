"""A prompt while it is read, and the requests that have it."""

import dataclasses
from collections.abc import Sequence

from lljax.generation.completion import Growing, Request
from lljax.generation.prefixes import Key
from lljax.models.cache import Cache


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
