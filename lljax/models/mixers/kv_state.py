"""Keys and values of the tokens that an attention layer has read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8KV:
    """Keys or values in eight bits: codes, and a float32 scale for each head of a token."""

    codes: Int8[Array, "... H"]
    scale: Float[Array, "... 1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values [..., B, K, S, H] in the order that attention reads; a
    `lljax.models.mixers.mixer.State`.
    """

    k: Float[Array, "... B K S H"] | Int8KV
    v: Float[Array, "... B K S H"] | Int8KV

    @staticmethod
    def abstract(shape: tuple[int, int, int, int], dtype: Any) -> "KVState":
        """Of `jax.ShapeDtypeStruct`s. shape: (B, K, S, H). dtype: int8 for `Int8KV`."""
        values: Any = jax.ShapeDtypeStruct(shape, dtype)
        if jnp.dtype(dtype) == jnp.int8:
            scale: Any = jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
            values = Int8KV(values, scale)
        return KVState(values, values)

    def encode(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "KVState":
        """Keys and values of new tokens in the form that this state keeps them in."""
        return KVState(_encode(k, self.k), _encode(v, self.v))

    def decode(self, dtype: Any) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer in `dtype`."""
        return _decode(self.k, dtype), _decode(self.v, dtype)

    def write(self, update: "KVState", start: Int[Array, ""] | int) -> "KVState":
        def put(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=-2)

        return jax.tree.map(put, self, update)

    def grow(self, slots: int) -> "KVState":
        def pad(x):
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)])

        return jax.tree.map(pad, self)


def _encode(new: Float[Array, "B T K H"], like: jax.Array | Int8KV) -> jax.Array | Int8KV:
    new = jnp.moveaxis(new, 1, 2)
    if not isinstance(like, Int8KV):
        return new.astype(like.dtype)
    wide = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    codes = jnp.round(wide / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
    return Int8KV(codes=codes, scale=scale)


def _decode(kept: jax.Array | Int8KV, dtype: Any) -> Float[Array, "B S K H"]:
    x = (kept.codes * kept.scale).astype(dtype) if isinstance(kept, Int8KV) else kept
    return jnp.moveaxis(x, 1, 2)
