"""The states of all layers after the tokens that a model has read, so that it continues without
reading them again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lljax.attention.shard import HEADS
from lljax.models.mixers import MIXERS
from lljax.models.mixers.mixer import State
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import ROWS, Layout, sharding_for_shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """states: the mixer's state of each layer, arrays [B, ...]. A layer has arrays of its own, so
    that it writes its new tokens in place.
    used: tokens that each row has read. The token at position p of a row is in slot p.
    slots: tokens for which a row has room, S.
    """

    states: tuple[State, ...]
    used: Int[Array, " B"]
    slots: int = dataclasses.field(metadata={"static": True})


def empty_cache(spec: DecoderSpec, B: int, S: int, dtype: Any = jnp.float32) -> Cache:
    """Room for S tokens of B rows. dtype: the dtype of keys and values; int8 keeps them in eight
    bits with scales.
    """
    states = tuple(
        jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            MIXERS[layer.mixer].abstract_state(spec, layer, B, S, dtype),
        )
        for layer in spec.layers
    )
    return Cache(states, jnp.zeros(B, jnp.int32), S)


def cache_bytes(spec: DecoderSpec, tokens: int, dtype: Any) -> int:
    """Bytes of the states of one row of so many tokens; see `empty_cache`."""
    states = jax.eval_shape(lambda: empty_cache(spec, 1, tokens, dtype).states)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens."""
    states = tuple(state.grow(slots) for state in cache.states)
    return dataclasses.replace(cache, states=states, slots=slots)


def fork(trunk: Cache, B: int, S: int) -> Cache:
    """B rows that continue the first row of `trunk`, with room for S tokens of their own each. They
    are continued beside `trunk`: `Decoder.continued`.
    """
    states = tuple(state.fork(B, S) for state in trunk.states)
    return Cache(states, jnp.zeros(B, jnp.int32), S)


def cache_sharding(cache: Cache, layout: Layout) -> Cache:
    """How the arrays of a cache lie on the mesh: rows over the devices that share rows, the next
    axis, heads in most states, over those that share heads; uncut where they do not divide.
    """

    def one(x: Any) -> NamedSharding:
        axes = PartitionSpec(*(ROWS, HEADS)[: len(x.shape)])
        return sharding_for_shape(NamedSharding(layout.mesh, axes), x.shape)

    return jax.tree.map(one, cache)


def take_rows(tree: Any, rows: Int[Array, " rows"]) -> Any:
    """The rows of these numbers, of a cache or of any tree of arrays [B, ...]."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)
