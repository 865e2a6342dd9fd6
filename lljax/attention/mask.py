"""Which keys a query may see, as ranges: never a dense T x S array.

A key is visible to a query when it is not later, belongs to the same segment and the same group,
and lies within the window or is an anchor. All of it is decided from integers that travel with the
tokens, so tokens may be reordered. `lljax.attention.blocks` derives from it which blocks a kernel
visits.

A segment may be a prompt with several answers: a trunk (branch 0) and branches 1, 2, ... A token
sees the trunk and its own branch only (`branched`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lljax.parallel.rounding import cdiv

Index = int | jax.Array  # index of a token or block; traced in loops
NEVER = jnp.iinfo(jnp.int32).max  # the index of a key that no query may see


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Letters: B batch, T queries, S keys.

    q_index, k_index: place of the token in its row. Causality, window and groups compare these.
    q_segments, k_segments: document of the token in its row; None for one document. With branches,
      one number for segment and branch (`branched`).
    anchors: keys that are visible from beyond the window; None for none.
    q_trunks: the number of the query's trunk, whose keys it sees beside those of its own number;
      None without branches.
    window: number of tokens a query sees, itself included; None for no limit.
    group, shift: tokens see only their own group of `group` tokens; the first group has `shift`
      tokens (0: `group`). None for one group.
    ordered: a promise: queries and keys are the same tokens, one after the other, from the start of
      a row or group.
    """

    q_index: Int[Array, "B T"]
    k_index: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None = None
    k_segments: Int[Array, "B S"] | None = None
    anchors: Bool[Array, "B S"] | None = None
    q_trunks: Int[Array, "B T"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
    shift: int = dataclasses.field(default=0, metadata={"static": True})
    ordered: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **changes) -> "Mask":
        """The mask with some fields changed. New indices do not keep the promise of order."""
        if "q_index" in changes or "k_index" in changes:
            changes = {"ordered": False} | changes
        return dataclasses.replace(self, **changes)


def causal(B: int, T: int, segments: Int[Array, "B T"] | None = None) -> Mask:
    """The causal mask of rows of T tokens; documents of a packed row (`segments`) do not see each
    other.
    """
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return Mask(index, index, segments, segments, ordered=True)


def branched(mask: Mask, positions: Int[Array, "B T"], branches: Int[Array, "B T"]) -> Mask:
    """The mask of rows of prompts with several answers each: the answers of a segment see its trunk
    and not each other.

    positions: place of each token in its own sequence, trunk and branch, from 0. It becomes the
      index, so that causality, windows and groups are the same as in a row of that sequence alone.
    branches: 0 for the trunk of a segment (and for a segment without branches), 1, 2, ... for its
      answers.

    Segment and branch make one number that grows along the row: the ranges of blocks stay narrow.
    Segments times branches, times chunks, must be below 2^31. Segment 0 is padding, which no token
    sees.
    """
    assert mask.q_segments is not None, "branches need segments, which tell padding from a trunk"
    trunks = mask.q_segments * (jnp.max(branches, axis=1, keepdims=True) + 1)
    return mask.replace(
        q_index=positions,
        k_index=jnp.where(mask.q_segments == 0, NEVER, positions),
        q_segments=trunks + branches,
        k_segments=trunks + branches,
        q_trunks=trunks,
    )


def chunked(
    mask: Mask, q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], chunk: int
) -> Mask:
    """The mask that also cuts every document into chunks of `chunk` tokens, which do not see each
    other.

    q_positions, k_positions: place of a token in its document, below S.

    Chunks become documents: segment and chunk make one number that grows along the row, so that the
    ranges of blocks stay narrow. No key is more than a chunk away, so the window is set to it: it
    limits how far back a query looks.
    """
    chunks = cdiv(mask.k_index.shape[1], chunk)  # chunks of a document, at most
    if chunks == 1:
        return mask

    def cut(segments, positions):
        return positions // chunk + (0 if segments is None else segments * chunks)

    window = chunk if mask.window is None else min(mask.window, chunk)
    return mask.replace(
        q_segments=cut(mask.q_segments, q_positions),
        k_segments=cut(mask.k_segments, k_positions),
        q_trunks=None if mask.q_trunks is None else cut(mask.q_trunks, q_positions),
        window=window,
    )


def group_of(mask: Mask, index: jax.Array) -> jax.Array:
    """The number of the group of each index, for a mask with groups."""
    assert mask.group is not None, "the mask has no groups"
    return (index + (mask.group - mask.shift) % mask.group) // mask.group


def group_start(mask: Mask, index: jax.Array) -> jax.Array:
    """The first index of the group of each index; not above 0 for the first group."""
    assert mask.group is not None, "the mask has no groups"
    return group_of(mask, index) * mask.group - (mask.group - mask.shift) % mask.group


def visible(mask: Mask) -> Bool[Array, "B T S"]:
    """The dense mask: of a pair of blocks (`block`), or for a reference."""
    q, k = mask.q_index[:, :, None], mask.k_index[:, None, :]
    see = (k <= q) & (k != NEVER)
    if mask.window is not None:
        near = q - k < mask.window
        see &= near if mask.anchors is None else near | mask.anchors[:, None, :]
    if mask.group is not None:
        see &= group_of(mask, q) == group_of(mask, k)
    if mask.q_segments is not None and mask.k_segments is not None:
        k_segments = mask.k_segments[:, None, :]
        same = mask.q_segments[:, :, None] == k_segments
        see &= same if mask.q_trunks is None else same | (mask.q_trunks[:, :, None] == k_segments)
    return see


def block(mask: Mask, q_start: Index, bq: int, k_start: Index, bk: int) -> Mask:
    """The mask between queries [q_start, q_start + bq) and keys [k_start, k_start + bk); starts may
    be traced.
    """

    def cut(x: jax.Array | None, start: Index, size: int):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return mask.replace(
        q_index=cut(mask.q_index, q_start, bq),
        q_segments=cut(mask.q_segments, q_start, bq),
        q_trunks=cut(mask.q_trunks, q_start, bq),
        k_index=cut(mask.k_index, k_start, bk),
        k_segments=cut(mask.k_segments, k_start, bk),
        anchors=cut(mask.anchors, k_start, bk),
    )


def pad(mask: Mask, T: int, S: int) -> Mask:
    """Extends the mask to T queries that see nothing and S keys that nothing sees."""

    def extend(x: jax.Array | None, size: int, value: int | bool):
        if x is None:
            return None
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=value)

    return mask.replace(
        q_index=extend(mask.q_index, T, -1),
        q_segments=extend(mask.q_segments, T, -1),
        q_trunks=extend(mask.q_trunks, T, -1),
        k_index=extend(mask.k_index, S, NEVER),
        k_segments=extend(mask.k_segments, S, -1),
        anchors=extend(mask.anchors, S, False),
    )


def of_keys(mask: Mask, change: Callable[[jax.Array], jax.Array]) -> Mask:
    """The mask with `change` applied to its arrays over keys."""
    keys = (mask.k_index, mask.k_segments, mask.anchors)
    k_index, k_segments, anchors = jax.tree.map(change, keys)
    return mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors)
