"""The attention that a stage of the schedule trains with: a table of its kinds."""

import dataclasses
from collections.abc import Callable

from lljax.config import Config


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of S2-Attn: `size` tokens each. For the second half of the query heads the first group
    has `shift` tokens, which moves all groups (0: both halves have the same groups).
    """

    size: int
    shift: int


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """The limits that a stage adds to the mask of the model, and the implementation of attention.

    kind: a key of `KINDS`.
    group: tokens of a group, for shifted. shift: whether the groups of the second half of the heads
      are moved by half a group; False is the ablation of the LongLoRA paper.
    window: tokens, for window. anchors: the first tokens of each document, visible from beyond the
      window. markers: ids of tokens that are anchors wherever they stand.
    implementation: "auto" or a key of `lljax.attention.attend.IMPLEMENTATIONS`.
    """

    kind: str = "full"
    group: int = 0
    shift: bool = True
    window: int = 0
    anchors: int = 0
    markers: tuple[int, ...] = ()
    implementation: str = "auto"

    @property
    def groups(self) -> Groups | None:
        """The groups of the row; None without."""
        return Groups(self.group, self.group // 2 if self.shift else 0) if self.group else None


FULL = AttentionPattern()


def group_size(group: float, T: int) -> int:
    """Tokens of a group for rows of T: `group` itself, or below 1 a share of the row, rounded up to
    an even number of at least 2.
    """
    return int(group) if group >= 1 else max(2, 2 * round(group * T / 2))


def _full(context: Config, length: int, markers: tuple[int, ...]) -> AttentionPattern:
    return AttentionPattern("full", implementation=context.implementation)


def _shifted(context: Config, length: int, markers: tuple[int, ...]) -> AttentionPattern:
    return AttentionPattern(
        "shifted",
        group=group_size(context.group, length),
        implementation=context.implementation,
    )


def _window(context: Config, length: int, markers: tuple[int, ...]) -> AttentionPattern:
    return AttentionPattern(
        "window",
        window=context.window,
        anchors=context.anchors,
        markers=markers,
        implementation=context.implementation,
    )


# Kinds that context.schedule takes. A row makes the pattern of a stage from `config.context`, the
# length of its rows and the token ids of context.anchor_markers.
KINDS: dict[str, Callable[..., AttentionPattern]] = {
    "full": _full,
    "shifted": _shifted,
    "window": _window,
}
