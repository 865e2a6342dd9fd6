"""Context parallelism for groups and windows: a device fetches the few tokens before its own (its
halo). Bytes do not grow with T. Runs inside shard_map.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.attend import attend
from lljax.attention.mask import NEVER, Mask, of_keys
from lljax.attention.options import AttentionOptions
from lljax.attention.shard import Shard, attend_heads, from_before
from lljax.parallel.sharding import TOKENS

_gather = functools.partial(jax.lax.all_gather, axis_name=TOKENS, axis=1, tiled=True)
_join = functools.partial(jnp.concatenate, axis=1)


def attend_halo(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    shard: Shard,
) -> Float[Array, "B T N H"]:
    heads = shard.heads()

    def attend_near(
        q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, options: AttentionOptions
    ):
        shifts = (mask.shift,)
        if heads.groups is not None and heads.count > 1:
            # which half the heads of a device belong to is known at run time only
            shifts = (0, heads.groups.shift)
        reach = max(
            halo_size(q.shape[1], shard.size, window=mask.window, group=mask.group, shift=shift)
            for shift in shifts
        )
        if mask.anchors is not None:
            return _attend_anchors(q, k, v, mask, options, (shard.size, reach))
        k, v, mask = _extended(k, v, mask, shard.size, reach)
        return attend(q, k, v, mask, options)

    return attend_heads(q, k, v, mask, options, heads, attend=attend_near)


def halo_size(T: int, size: int, *, window: int | None, group: int | None, shift: int = 0) -> int:
    """How many tokens before its own a device of T tokens, one of `size`, needs for its first
    query.
    """
    limits = [(size - 1) * T]
    if window is not None:
        limits.append(window - 1)
    if group is not None:
        limits.append(max((i * T + (group - shift) % group) % group for i in range(1, size)))
    return min(limits)


def _extended(
    k: jax.Array, v: jax.Array, mask: Mask, size: int, reach: int
) -> tuple[jax.Array, jax.Array, Mask]:
    """k, v and the mask with the last `reach` tokens of the device before in front."""
    if reach == 0:
        return k, v, mask
    arrays = (k, v, mask.k_index, mask.k_segments, mask.anchors)
    before = from_before(jax.tree.map(lambda x: x[:, -reach:], arrays), size)
    k, v, k_index, k_segments, anchors = jax.tree.map(
        lambda before, after: _join([before, after]), before, arrays
    )
    return k, v, mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors)


def _attend_anchors(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    options: AttentionOptions,
    halo: tuple[int, int],
) -> jax.Array:
    """Window and anchors: the halo serves the near keys, and each device sends the others its
    anchors, as many as there is room for. A row with more of them on one device gathers all its
    keys.

    halo: devices, and tokens before the first of a device.
    """
    assert mask.anchors is not None, "the mask has no anchors"
    size, reach = halo
    room = max(1, min(k.shape[1], k.shape[1] // 8 + 128))
    fits = jax.lax.pmax(jnp.max(jnp.sum(mask.anchors, axis=1)), TOKENS) <= room

    def near_and_anchors(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask):
        assert mask.anchors is not None
        order = jnp.argsort(~mask.anchors, axis=1, stable=True)[:, :room]

        def anchors_of(x: jax.Array):  # [B, T, ...] -> [B, size * room, ...]
            places = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
            return _gather(jnp.take_along_axis(x, places, axis=1))

        far = of_keys(mask, anchors_of)
        # An anchor of this device or of the halo is there already; a place that holds no anchor is
        # no key.
        first = jnp.min(mask.q_index, axis=1, keepdims=True)
        assert far.anchors is not None
        unseen = far.anchors & (far.k_index < first - reach)
        far = far.replace(k_index=jnp.where(unseen, far.k_index, NEVER))
        near_k, near_v, near = _extended(k, v, mask, size, reach)
        k_index, k_segments, anchors = jax.tree.map(
            lambda far, near: _join([far, near]),
            (far.k_index, far.k_segments, far.anchors),
            (near.k_index, near.k_segments, near.anchors),
        )
        both = near.replace(k_index=k_index, k_segments=k_segments, anchors=anchors)
        k, v = _join([anchors_of(k), near_k]), _join([anchors_of(v), near_v])
        return attend(q, k, v, both, options)

    def everything(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask):
        return attend(q, _gather(k), _gather(v), of_keys(mask, _gather), options)

    return jax.lax.cond(fits, near_and_anchors, everything, q, k, v, mask)
