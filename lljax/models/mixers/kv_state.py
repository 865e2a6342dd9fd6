"""Keys and values of the tokens that an attention layer has read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Int8

IN_ORDER = Layout(major_to_minor=(0, 1, 2, 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8KV:
    """Keys or values in eight bits: codes, and a float32 scale for each head of a token."""

    codes: Int8[Array, "... H"]
    scale: Float[Array, "... 1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys and values in the order that attention reads; a `lljax.models.mixers.mixer.State`."""

    k: Float[Array, "B K S H"] | Int8KV
    v: Float[Array, "B K S H"] | Int8KV

    @staticmethod
    def abstract(shape: tuple[int, int, int, int], dtype: Any) -> "KVState":
        """Of `jax.ShapeDtypeStruct`s. shape: (B, K, S, H). dtype: int8 for `Int8KV`."""
        values: Any = jax.ShapeDtypeStruct(shape, dtype)
        if jnp.dtype(dtype) == jnp.int8:
            scale: Any = jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
            values = Int8KV(values, scale)
        return KVState(values, values)

    @property
    def is_float(self) -> bool:
        """Whether keys and values are kept as they are."""
        return not isinstance(self.k, Int8KV)

    def encode(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "KVState":
        """Keys and values of new tokens in the form that this state keeps them in."""
        return KVState(_encode(k, self.k), _encode(v, self.v))

    def decode(self, dtype: Any) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer in `dtype`."""
        return _decode(self.k, dtype), _decode(self.v, dtype)

    def write(self, update: "KVState", start: Int[Array, " B"]) -> "KVState":
        return jax.tree.map(lambda old, new: _written(old, new, start), self, update)

    def part(self, start: Int[Array, ""], T: int) -> "KVState":
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, T, axis=2), self)

    def grow(self, slots: int) -> "KVState":
        def pad(x):
            return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

        return jax.tree.map(pad, self)

    def fork(self, B: int, S: int) -> "KVState":
        """Empty: what the rows share stays where it is."""

        def empty(x):
            return jnp.zeros((B, x.shape[1], S, x.shape[3]), x.dtype)

        return jax.tree.map(empty, self)


def read_part(
    state: KVState, start: Int[Array, ""], T: int, dtype: Any
) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Keys and values of T slots in `dtype`, in the order that they are kept in."""
    # The barriers: XLA:CPU computes in float32, and would convert all slots before it cuts these
    # out, once before the loop that calls this.
    state, start = jax.lax.optimization_barrier((state, start))
    part = jax.lax.optimization_barrier(state.part(start, T))
    return _dequantized(part.k, dtype), _dequantized(part.v, dtype)


def _written(
    old: Float[Array, "B K S H"], new: Float[Array, "B K T H"], start: Int[Array, " B"]
) -> Float[Array, "B K S H"]:
    """In the forms that compilers turn into a write in place."""
    B, T = old.shape[0], new.shape[2]
    if T > 1:
        put = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        return jax.lax.platform_dependent(
            put(old, new, start), cuda=_kept_in_order, default=lambda written: written
        )
    # A scatter of one update becomes a slice update, which XLA:CPU fuses into everything that reads
    # it, with a copy of the whole for each: so one row is written twice.
    rows = jnp.arange(max(B, 2)) % B
    return old.at[rows, :, start[rows]].set(new[rows, :, 0], mode="drop")


def _kept_in_order(written: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
    """Else XLA on a GPU writes to a copy of the whole cache: in the order that the attention kernel
    reads, or fused with the change of order. On a TPU this takes memory, and there is no copy.
    """
    return jax.lax.optimization_barrier(with_layout_constraint(written, IN_ORDER))


def _encode(new: Float[Array, "B T K H"], like: jax.Array | Int8KV) -> jax.Array | Int8KV:
    new = jnp.moveaxis(new, 1, 2)
    if not isinstance(like, Int8KV):
        return new.astype(like.dtype)
    wide = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    codes = jnp.round(wide / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
    return Int8KV(codes=codes, scale=scale)


def _decode(kept: jax.Array | Int8KV, dtype: Any) -> Float[Array, "B S K H"]:
    return jnp.moveaxis(_dequantized(kept, dtype), 1, 2)


def _dequantized(kept: jax.Array | Int8KV, dtype: Any) -> Float[Array, "B K S H"]:
    return (kept.codes * kept.scale).astype(dtype) if isinstance(kept, Int8KV) else kept
