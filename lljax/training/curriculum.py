"""The progressive context schedule: stages of (until_step, length, attention)."""

import dataclasses

from lljax.attention.pattern import KINDS, AttentionPattern
from lljax.config import Config


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps [start, stop) on rows of `length` tokens under `pattern`."""

    number: int
    start: int
    stop: int
    length: int
    pattern: AttentionPattern

    @property
    def label(self) -> str:
        return f"{self.length:,} {self.pattern.kind}"


def stages(context: Config, markers: tuple[int, ...] = ()) -> tuple[Stage, ...]:
    """The stages of a validated `config.context`. markers: token ids of its `anchor_markers`."""
    starts = (0, *(until for until, _, _ in context.schedule))
    return tuple(
        Stage(
            number=number,
            start=starts[number],
            stop=until,
            length=length,
            pattern=KINDS[kind](context, length, markers),
        )
        for number, (until, length, kind) in enumerate(context.schedule)
    )
