"""The attention that a stage of the schedule trains with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """What a stage of the schedule adds to the model's own mask: full | shifted (groups) | window
    (with anchors).
    """

    kind: str = "full"
    group: int = 0  # tokens, for shifted
    window: int = 0  # tokens, for window
    anchors: int = 0  # first tokens of each document, for window
    markers: tuple[int, ...] = ()  # token ids that are anchors wherever they stand, for window

    @property
    def groups(self) -> int | None:
        """Tokens of a group, None where the row is not cut into groups."""
        return self.group if self.kind == "shifted" else None


FULL = AttentionPattern()
