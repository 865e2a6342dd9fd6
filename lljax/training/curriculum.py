"""The progressive context schedule: stages of (until_step, length, attention)."""

import dataclasses

from lljax.attention.pattern import KINDS, AttentionPattern


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


def stages(context, markers: tuple[int, ...] = ()) -> tuple[Stage, ...]:
    """The stages of a (validated) `config.context`; `markers` are the token ids of its
    `anchor_markers`.
    """
    starts = (0, *(until for until, _, _ in context.schedule))
    return tuple(
        Stage(number, start, until, length, KINDS[kind](context, length, markers))
        for number, (start, (until, length, kind)) in enumerate(zip(starts, context.schedule))
    )
