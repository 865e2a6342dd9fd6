"""Keys and values of the tokens that a model has read, so that it goes on without reading them
again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lljax.attention import Mask
from lljax.attention.mask import NEVER
from lljax.models.spec import DecoderSpec, repeats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Keys or values in eight bits: codes int8 [..., H], and the float32 scale [..., 1] of each
    head of a token.
    """

    codes: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """kv: for each stack of layers k and v, [layers of it, B, K, S, H] (or `Rounded`): in the order
    that attention reads.
    segments, positions: int32 [B, S]; segment 0 for padding. used: slots that are taken, int32; the
      same of every row.
    """

    kv: tuple[tuple[jax.Array | Rounded, jax.Array | Rounded], ...]
    segments: jax.Array
    positions: jax.Array
    used: jax.Array


def empty_cache(spec: DecoderSpec, B: int, S: int, dtype=jnp.float32) -> Cache:
    """Room for S tokens of B rows. dtype: that of keys and values; int8 for `Rounded`."""
    stacks = [times for _, places, times in repeats(spec.layers) for _ in places]

    def one(layers):
        shape = (layers, B, spec.K, S, spec.H)
        if jnp.dtype(dtype) == jnp.int8:
            return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return jnp.zeros(shape, dtype)

    return Cache(
        tuple((one(layers), one(layers)) for layers in stacks),
        *(jnp.zeros((B, S), jnp.int32) for _ in range(2)),
        jnp.int32(0),
    )


def extend(cache: Cache, positions: jax.Array, segments: jax.Array | None) -> tuple[Cache, Mask]:
    """The cache with tokens at `positions` [B, T] counted in, and the mask of those tokens over
    it.
    """
    T = positions.shape[1]
    segments = jnp.ones_like(positions) if segments is None else segments
    k_segments, k_positions = (
        _put(old, new, cache.used)
        for old, new in ((cache.segments, segments), (cache.positions, positions))
    )
    # Windows count tokens, not slots: between a shared beginning and what a row has of its own
    # there may be padding.
    k_index = jnp.where(jnp.arange(k_positions.shape[1]) < cache.used + T, k_positions, NEVER)
    return (
        dataclasses.replace(cache, segments=k_segments, positions=k_positions, used=cache.used + T),
        Mask(positions, k_index, segments, k_segments),
    )


def kept(new: jax.Array, held):
    """Keys or values of new tokens [B, T, K, H] as a cache that holds `held` keeps them: [B, K, T,
    H].
    """
    new = jnp.moveaxis(new, 1, 2)
    if not isinstance(held, Rounded):
        return new.astype(held.dtype)
    wide = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    return Rounded(jnp.round(wide / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale)


def write(held, new, start):
    """`held` [..., S, H] with `new` [..., T, H], both as they are kept, from slot `start` on."""
    return jax.tree.map(lambda old, new: _put(old, new, start, axis=-2), held, new)


def read(held, dtype) -> jax.Array:
    """[B, S, K, H] in `dtype` of what is kept of a layer, [B, K, S, H]."""
    return jnp.moveaxis(
        (held.codes * held.scale).astype(dtype) if isinstance(held, Rounded) else held, 1, 2
    )


def repeated(cache: Cache, rows: int) -> Cache:
    """The cache of one row as that of `rows` rows that begin alike."""

    def along(axis):
        return lambda x: jnp.repeat(x, rows, axis=axis)

    return Cache(
        jax.tree.map(along(1), cache.kv),
        along(0)(cache.segments),
        along(0)(cache.positions),
        cache.used,
    )


def longer(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens."""

    def along(axis):
        return lambda x: jnp.pad(
            x, [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        )

    return Cache(
        jax.tree.map(along(3), cache.kv),
        along(1)(cache.segments),
        along(1)(cache.positions),
        cache.used,
    )


def _put(old, new, start, axis=1):
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
