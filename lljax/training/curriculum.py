"""The progressive context schedule: stages of (until_step, length, attention)."""

import dataclasses

from lljax.attention.pattern import AttentionPattern
from lljax.attention.shifted import group_size
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
            pattern=_pattern(context, kind, length, markers),
        )
        for number, (until, length, kind) in enumerate(context.schedule)
    )


def _pattern(context: Config, kind: str, length: int, markers: tuple[int, ...]) -> AttentionPattern:
    if kind == "shifted":
        return AttentionPattern("shifted", group=group_size(context.group, length))
    if kind == "window":
        return AttentionPattern(
            "window", window=context.window, anchors=context.anchors, markers=markers
        )
    return AttentionPattern("full")
