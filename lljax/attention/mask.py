"""Which keys a query may see, as ranges: never a dense T x S array.

A key is visible to a query when it is not later, belongs to the same segment and the same group,
and lies within the window or is an anchor. All of it is decided from integers that travel with the
tokens, so tokens may be reordered.
"""

import dataclasses

import jax
import jax.numpy as jnp

NEVER = jnp.iinfo(jnp.int32).max  # the index of a key that no query may see


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Letters: B batch, T queries, S keys.

    q_index [B, T], k_index [B, S]: place of the token in its row, int32. Causality, window and
    groups compare these. q_segments [B, T], k_segments [B, S]: document of the token in its row,
    int32, or None for one document. anchors [B, S]: bool, keys that are visible from beyond the
    window, or None.
    window: number of tokens a query sees, itself included; None for no limit.
    group, shift: tokens see only their own group of `group` tokens, the first of which is cut short
      to `shift` tokens (0: not cut); None for one group.
    ordered: a promise: queries and keys are the same tokens, one after the other, from the start of
      a row or group.
    """

    q_index: jax.Array
    k_index: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    anchors: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
    shift: int = dataclasses.field(default=0, metadata={"static": True})
    ordered: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **changes) -> "Mask":
        """The mask with some fields changed. Other indices are not promised to be in order."""
        if "q_index" in changes or "k_index" in changes:
            changes = {"ordered": False} | changes
        return dataclasses.replace(self, **changes)


def causal(B: int, T: int, segments: jax.Array | None = None) -> Mask:
    """The plain causal mask of rows of T tokens; documents of a packed row (`segments` [B, T]) do
    not see each other.
    """
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return Mask(index, index, segments, segments, ordered=True)


def chunked(mask: Mask, q_positions: jax.Array, k_positions: jax.Array, chunk: int) -> Mask:
    """The mask that also cuts every document into chunks of `chunk` tokens, which do not see each
    other.

    positions int32 [B, T] and [B, S]: of a token in its document, below S. Chunks are documents of
    their own: segment and chunk make one number that grows along the row, so that the ranges of
    blocks stay narrow; and since no key is further away, the window says so to what asks how far
    back a query looks.
    """
    chunks = -(-mask.k_index.shape[1] // chunk)  # of a document, at most
    if chunks == 1:
        return mask

    def cut(segments, positions):
        return positions // chunk + (0 if segments is None else segments * chunks)

    window = chunk if mask.window is None else min(mask.window, chunk)
    return mask.replace(
        q_segments=cut(mask.q_segments, q_positions),
        k_segments=cut(mask.k_segments, k_positions),
        window=window,
    )


def group_of(mask: Mask, index: jax.Array) -> jax.Array:
    """The group that each index belongs to, for a mask with groups."""
    return (index + (mask.group - mask.shift) % mask.group) // mask.group


def visible(mask: Mask) -> jax.Array:
    """Dense bool [B, T, S]. For a pair of blocks, or a reference; `block` cuts a mask down to a
    pair of blocks.
    """
    q, k = mask.q_index[:, :, None], mask.k_index[:, None, :]
    see = (k <= q) & (k != NEVER)
    if mask.window is not None:
        near = q - k < mask.window
        see &= near if mask.anchors is None else near | mask.anchors[:, None, :]
    if mask.group is not None:
        see &= group_of(mask, q) == group_of(mask, k)
    if mask.q_segments is not None:
        see &= mask.q_segments[:, :, None] == mask.k_segments[:, None, :]
    return see


def block(mask: Mask, q_start, bq: int, k_start, bk: int) -> Mask:
    """The mask between queries [q_start, q_start + bq) and keys [k_start, k_start + bk); starts may
    be traced.
    """

    def cut(x, start, size):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return mask.replace(
        q_index=cut(mask.q_index, q_start, bq),
        q_segments=cut(mask.q_segments, q_start, bq),
        k_index=cut(mask.k_index, k_start, bk),
        k_segments=cut(mask.k_segments, k_start, bk),
        anchors=cut(mask.anchors, k_start, bk),
    )


def pad(mask: Mask, T: int, S: int) -> Mask:
    """Extends the mask to T queries that see nothing and S keys that nothing sees."""

    def extend(x, size, value):
        return (
            None
            if x is None
            else jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=value)
        )

    return mask.replace(
        q_index=extend(mask.q_index, T, -1),
        q_segments=extend(mask.q_segments, T, -1),
        k_index=extend(mask.k_index, S, NEVER),
        k_segments=extend(mask.k_segments, S, -1),
        anchors=extend(mask.anchors, S, False),
    )


def block_kinds(mask: Mask, bq: int, bk: int) -> tuple[jax.Array, jax.Array]:
    """Which pairs of blocks hold no visible pair, and which hold nothing else: bool [T / bq, S /
    bk] each.

    Decided for the whole batch from the smallest and largest index, segment and group of each
    block. Both answers err
    to False only: skipping an empty pair and leaving the mask of a full pair unread change nothing.
    """

    # of the real tokens: padding must not stretch the range of its block
    def extremes(x, size, real=True):
        x = x.reshape(x.shape[0], -1, size)
        real = jnp.broadcast_to(real, mask.k_index.shape if real is not True else x.shape).reshape(
            x.shape
        )
        return jnp.where(real, x, NEVER).min(-1), jnp.where(real, x, -NEVER).max(-1)

    def against(x_q, x_k):  # (low, high) of queries [B, T / bq, 1] and of keys [B, 1, S / bk]
        return (
            tuple(x[:, :, None] for x in extremes(x_q, bq)),
            tuple(x[:, None, :] for x in extremes(x_k, bk, real)),
        )

    real = mask.k_index != NEVER
    whole = real.reshape(real.shape[0], 1, -1, bk).all(-1)
    (q_low, q_high), (k_low, k_high) = against(mask.q_index, mask.k_index)
    some, all_ = (k_low <= q_high) & (k_high >= 0), whole & (k_high <= q_low)
    if mask.window is not None:
        some_near, all_near = q_low - k_high < mask.window, q_high - k_low < mask.window
        if mask.anchors is not None:
            anchors = mask.anchors.reshape(mask.anchors.shape[0], 1, -1, bk)
            some_near, all_near = some_near | anchors.any(-1), all_near | anchors.all(-1)
        some, all_ = some & some_near, all_ & all_near
    pairs = (
        []
        if mask.group is None
        else [(group_of(mask, mask.q_index), group_of(mask, jnp.where(real, mask.k_index, 0)))]
    )
    pairs += [] if mask.q_segments is None else [(mask.q_segments, mask.k_segments)]
    for q, k in pairs:
        (q_low, q_high), (k_low, k_high) = against(q, k)
        some &= (q_low <= k_high) & (k_low <= q_high)
        all_ &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return ~some.any(0), all_.all(0)
