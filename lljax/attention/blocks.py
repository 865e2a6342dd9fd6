"""Which blocks of keys a block of queries visits: the arithmetic of every tiled implementation.

The mask becomes a few integers per token (`compared`), each with one rule (`token_visible`):

  name     query's integer                key's integer            visible if    rule
  index    index                          index; padding: NEVER    key <= query  causality
  near     index - window + 1             index; anchor: NEVER     key >= query  window
  first    first index of its group       index                    key >= query  groups
  segment  segment                        segment                  key == query  documents, chunks
  trunk    segment of its trunk           segment                  key == query  branches

`trunk` is an alternative to `segment`: one of the two must be equal.

The smallest and largest of each in a block (`extremes`) then decide for a pair of blocks whether
any pair of tokens may be visible (`any_visible`: the pair is visited) and whether all of them are
(`all_visible`: no mask is needed). Both are exact while the tokens of a block stand in order in one
segment, and otherwise are conservative: a pair that is visited in vain, or masked in vain, changes
no result.

All functions take arrays that broadcast against each other, or the scalars of a kernel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lljax.attention.mask import NEVER, Mask, group_start, of_keys

Rows = dict[str, Int[Array, "B length"]]  # integers per token, by name
Extremes = dict[str, jax.Array]  # per block: {name}_low, {name}_high, `last`; see `extremes`


def pad_tokens(x: jax.Array, length: int, **options) -> jax.Array:
    """x [B, T, ...] padded to `length` tokens; options: kwargs for `jnp.pad`, zeros without."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)), **options)


# ---------------------------------------------------------------- tokens
def compared(mask: Mask) -> tuple[Rows, Rows]:
    """The mask as integers of the queries [B, T] and of the keys [B, S], by name."""
    q, k = {"index": mask.q_index}, {"index": mask.k_index}
    if mask.window is not None:
        q["near"] = mask.q_index - mask.window + 1
        if mask.anchors is not None:
            k["near"] = jnp.where(mask.anchors, NEVER, mask.k_index)
    if mask.group is not None:
        q["first"] = group_start(mask, mask.q_index)
    if mask.q_segments is not None and mask.k_segments is not None:
        q["segment"], k["segment"] = mask.q_segments, mask.k_segments
        if mask.q_trunks is not None:
            q["trunk"] = mask.q_trunks
    return q, k


def token_visible(q: Rows, k: Rows) -> jax.Array:
    """Bool: which queries see which keys, from integers of `compared` that broadcast."""
    see = k["index"] <= q["index"]
    if "near" in q:
        see &= k.get("near", k["index"]) >= q["near"]
    if "first" in q:
        see &= k["index"] >= q["first"]
    if "segment" in q:
        same = k["segment"] == q["segment"]
        see &= same | (k["segment"] == q["trunk"]) if "trunk" in q else same
    return see


# ---------------------------------------------------------------- pairs of blocks
def extremes(rows: Rows, size: int) -> Extremes:
    """The smallest and largest of every row [B, blocks * size] in each block, [B, blocks] each.

    Only real tokens count: padding must not stretch the range of its block. `last` is the largest
    index, padding (NEVER) included.
    """
    rows = {name: x.reshape(x.shape[0], -1, size) for name, x in rows.items()}
    real = rows["index"] != NEVER
    result = {"last": rows["index"].max(-1)}
    for name, x in rows.items():
        result[f"{name}_low"] = jnp.where(real, x, NEVER).min(-1)
        result[f"{name}_high"] = jnp.where(real, x, -NEVER).max(-1)
    return result


def any_visible(q: Extremes, k: Extremes) -> jax.Array:
    """Bool: whether a pair of blocks may hold a visible pair of tokens."""
    visible = k["index_low"] <= q["index_high"]  # false for a block of padding
    if "near_low" in q:
        visible &= k.get("near_high", k["index_high"]) >= q["near_low"]
    if "first_low" in q:
        visible &= k["index_high"] >= q["first_low"]
    if "segment_low" in q:
        same = (q["segment_low"] <= k["segment_high"]) & (k["segment_low"] <= q["segment_high"])
        visible &= same | _meets_trunk(q, k) if "trunk_low" in q else same
    return visible


def _meets_trunk(q: Extremes, k: Extremes) -> jax.Array:
    """Bool: whether a block of keys may hold keys of the trunks of a block of queries."""
    return (q["trunk_low"] <= k["segment_high"]) & (k["segment_low"] <= q["trunk_high"])


def all_visible(q: Extremes, k: Extremes) -> jax.Array:
    """Bool: whether every pair of tokens of a pair of blocks is visible."""
    visible = k["last"] <= q["index_low"]
    if "near_low" in q:
        visible &= k.get("near_low", k["index_low"]) >= q["near_high"]
    if "first_low" in q:
        visible &= k["index_low"] >= q["first_high"]
    if "segment_low" in q:
        same = (q["segment_low"] == q["segment_high"]) & (q["segment_low"] == k["segment_low"])
        if "trunk_low" in q:
            same |= (q["trunk_low"] == q["trunk_high"]) & (q["trunk_low"] == k["segment_low"])
        visible &= same & (k["segment_low"] == k["segment_high"])
    return visible


def after_trunk(q: Extremes, k: Extremes, visited: Bool[Array, "*blocks J"]) -> jax.Array:
    """Bool [*blocks, J]: the blocks of keys from the first visited one that holds no trunk of the
    queries on. Split there, what a query block visits is two short spans, of its trunk and of its
    branch, without the branches between them.
    """
    block = jnp.arange(visited.shape[-1], dtype=jnp.int32)
    own = visited & ~_meets_trunk(q, k)
    return block >= jnp.where(own, block, NEVER).min(-1, keepdims=True)


def block_pairs(
    mask: Mask, bq: int, bk: int
) -> tuple[Bool[Array, "*blocks J"], Bool[Array, "B I J"]]:
    """(any_visible, all_visible) of every pair of I = T / bq query and J = S / bk key blocks."""
    q_rows, k_rows = compared(mask)
    q = {name: x[:, :, None] for name, x in extremes(q_rows, bq).items()}
    k = {name: x[:, None, :] for name, x in extremes(k_rows, bk).items()}
    return any_visible(q, k), all_visible(q, k)


def span(visited: Bool[Array, "*blocks J"]) -> tuple[Int[Array, "*blocks"], Int[Array, "*blocks"]]:
    """(start, stop) of the shortest range that holds every visited block; (0, 0) without one."""
    block = jnp.arange(visited.shape[-1], dtype=jnp.int32)
    stop = jnp.where(visited, block + 1, 0).max(-1)
    return jnp.minimum(jnp.where(visited, block, NEVER).min(-1), stop), stop


def reach(mask: Mask, S: int) -> int:
    """The most keys that a query can see, anchors aside: of a group, a window, or all S."""
    return min(size for size in (mask.group, mask.window, S) if size is not None)


# ---------------------------------------------------------------- anchors
def anchors_first(
    k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], Mask, Int[Array, "B S"]]:
    """Moves the anchors to the front of the keys, so that they fill few blocks.

    A marker in every paragraph would otherwise make every block visited. The result of attention
    does not change: the mask is decided from indices, which move along.

    Returns: k, v, the mask, and the new index of every key (`in_row_order` takes it).
    """
    assert mask.anchors is not None, "the mask has no anchors"
    order = jnp.argsort(~mask.anchors, axis=1, stable=True)
    k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (k, v))
    moved = of_keys(mask, lambda x: jnp.take_along_axis(x, order, axis=1))
    return k, v, moved, _inverse_order(mask.anchors)


def _inverse_order(anchors: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """The inverse of the order of `anchors_first`. Counted: a sort takes a TPU compiler seconds."""
    before = jnp.cumsum(anchors, axis=1, dtype=jnp.int32)
    others = before[:, -1:] + jnp.arange(anchors.shape[1], dtype=jnp.int32) - before
    return jnp.where(anchors, before - 1, others)


def in_row_order(
    x: Float[Array, "B S K H"], places: Int[Array, "B S"] | None
) -> Float[Array, "B S K H"]:
    """Gradients of keys after `anchors_first`, in the order of the row; as they are if `places` is
    None.
    """
    return x if places is None else jnp.take_along_axis(x, places[:, :, None, None], axis=1)
