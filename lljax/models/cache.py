"""The states of all layers after the tokens that a model has read, so that it continues without
reading them again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lljax.attention import Mask
from lljax.attention.mask import NEVER
from lljax.models.mixers import MIXERS
from lljax.models.mixers.mixer import State
from lljax.models.spec import DecoderSpec, LayerSpec, repeats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """states: the mixer's state of each stack of layers, arrays [layers, B, ...].
    segments, positions: segment and position of the token in each slot; segment 0 for padding.
    used: slots that are taken, the same in every row.
    """

    states: tuple[State, ...]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


def empty_cache(spec: DecoderSpec, B: int, S: int, dtype: Any = jnp.float32) -> Cache:
    """Room for S tokens of B rows. dtype: the dtype of keys and values; int8 keeps them in eight
    bits with scales.
    """

    def state(layer: LayerSpec, times: int) -> State:
        return jax.tree.map(
            lambda x: jnp.zeros((times, *x.shape), x.dtype),
            MIXERS[layer.mixer].abstract_state(spec, layer, B, S, dtype),
        )

    return Cache(
        states=tuple(
            state(layer, times) for _, pattern, times in repeats(spec.layers) for layer in pattern
        ),
        segments=jnp.zeros((B, S), jnp.int32),
        positions=jnp.zeros((B, S), jnp.int32),
        used=jnp.int32(0),
    )


def extend(
    cache: Cache, positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> tuple[Cache, Mask]:
    """The cache with the slots of new tokens taken, and the mask of these tokens over all slots.
    The states are not written yet, see `write_states`.
    """
    T = positions.shape[1]
    segments = jnp.ones_like(positions) if segments is None else segments
    k_segments, k_positions = (
        jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=1)
        for old, new in ((cache.segments, segments), (cache.positions, positions))
    )
    # Windows count tokens, not slots: there may be padding between a shared prefix and the rest of
    # a row.
    k_index = jnp.where(jnp.arange(k_positions.shape[1]) < cache.used + T, k_positions, NEVER)
    return (
        dataclasses.replace(cache, segments=k_segments, positions=k_positions, used=cache.used + T),
        Mask(positions, k_index, segments, k_segments),
    )


def write_states(cache: Cache, updates: tuple[State, ...], start: Int[Array, ""] | int) -> Cache:
    """The cache with the updates of all layers, of the tokens from slot `start` on.

    Called once after all layers, so that it happens in place: a scan that returned whole states
    would hold them twice.
    """
    states = tuple(
        state.write(update, start) for state, update in zip(cache.states, updates, strict=True)
    )
    return dataclasses.replace(cache, states=states)


def repeat_rows(cache: Cache, rows: int) -> Cache:
    """The cache of one row for `rows` rows with the same beginning."""

    def along(axis):
        return lambda x: jnp.repeat(x, rows, axis=axis)

    return dataclasses.replace(
        cache,
        states=jax.tree.map(along(1), cache.states),
        segments=along(0)(cache.segments),
        positions=along(0)(cache.positions),
    )


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, slots - x.shape[1])))

    return dataclasses.replace(
        cache,
        states=tuple(state.grow(slots) for state in cache.states),
        segments=pad(cache.segments),
        positions=pad(cache.positions),
    )
