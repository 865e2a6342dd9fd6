"""Adam with moments of eight bits, blockwise: Dettmers et al. 2021, arXiv 2110.02861.

A block is a range of the last axis with one float32 scale. A code is the paper's dynamic tree in
closed form: the position of its highest set bit is the decimal exponent, and the remaining bits are
a linear fraction of that decade. Values down to 1e-6 (first moments) or 1e-8 (second moments) of
the largest value of a block keep a code. Computed by arithmetic: a search in a table would hold the
table's bounds for every weight.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

BLOCK = 256


class Moment(NamedTuple):
    """The moment of an array or of a tree of arrays.

    codes: int8 (signed) or uint8 of the same shape.
    scale: float32 of the same rank, one per block of the last axis.
    """

    codes: Any
    scale: Any


class State(NamedTuple):
    count: jax.Array
    mu: Moment
    nu: Moment


def scale_by_adam_8bit(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose state takes two bytes per weight; its arithmetic is float32."""

    def init(params: optax.Params):
        return State(jnp.int32(0), zeros(params, jnp.int8), zeros(params, jnp.uint8))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        count = state.count + 1
        new = jax.tree.map(
            lambda g, m, ms, v, vs: adam(
                g, Moment(m, ms), Moment(v, vs), count, b1=b1, b2=b2, eps=eps
            ),
            updates,
            *state.mu,
            *state.nu,
        )
        parts = jax.tree.structure((0, Moment(0, 0), Moment(0, 0)))
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(updates), parts, new)
        return updates, State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adam(
    gradient: jax.Array,
    mu: Moment,
    nu: Moment,
    count: jax.Array,
    *,
    b1: float,
    b2: float,
    eps: float,
):
    """(update, mu, nu) of an array at step `count`, from 1."""
    m = b1 * decode(*mu) + (1 - b1) * gradient
    v = b2 * decode(*nu) + (1 - b2) * gradient * gradient
    update = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
    return update, Moment(*encode(m, jnp.int8)), Moment(*encode(v, jnp.uint8))


def zeros(params: optax.Params, dtype: DTypeLike) -> Moment:
    return Moment(
        jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), params),
        jax.tree.map(
            lambda x: jnp.zeros((*x.shape[:-1], x.shape[-1] // block(x.shape[-1]))), params
        ),
    )


def block(size: int) -> int:
    """Values that share a scale along an axis of `size`: the largest divisor up to 256."""
    return next(n for n in range(min(BLOCK, size), 0, -1) if size % n == 0)


def encode(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of float32 x [..., n]; uint8 for x >= 0.

    A value above 0 never gets the code 0 of uint8: a second moment of 0 under a first moment that
    is not 0 would make an unbounded step. It becomes the smallest code, and the step smaller than
    it should be.
    """
    bits = _bits(dtype)
    parts = x.reshape(*x.shape[:-1], -1, block(x.shape[-1]))
    # The largest value of a block is the middle of the last code's interval, so it is exact.
    scale = jnp.max(jnp.abs(parts), axis=-1, keepdims=True) / _value(jnp.int32(2**bits - 1), bits)
    share = jnp.abs(parts) / jnp.where(scale == 0, 1.0, scale)
    decade = jnp.clip(jnp.floor(jnp.log10(jnp.maximum(share, 1e-30))) + bits, 0, bits - 1)
    levels = jnp.exp2(decade)
    fraction = (share * 10.0 ** (bits - 1 - decade) - 0.1) / 0.9
    codes = levels + jnp.clip(jnp.floor(fraction * levels), 0, levels - 1)
    if dtype == jnp.uint8:
        codes = jnp.where(parts > 0, codes, 0)
    else:  # below half of the smallest: 0
        codes = jnp.where(share < 0.5 * 10.0 ** (1 - bits), 0, codes) * jnp.sign(parts)
    return codes.astype(jnp.int32).astype(dtype).reshape(x.shape), scale[..., 0]


def decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 [..., n] of codes and scales."""
    parts = codes.astype(jnp.int32).reshape(*scale.shape, -1)
    value = jnp.sign(parts) * _value(jnp.abs(parts), _bits(codes.dtype)) * scale[..., None]
    return value.reshape(codes.shape)


def _value(code: jax.Array, bits: int):
    """The value of a code from 0 (which means 0) to 2 ** bits - 1, as a share of the scale."""
    decade = 31 - jax.lax.clz(jnp.maximum(code, 1))
    levels = jnp.exp2(decade.astype(jnp.float32))
    return jnp.where(
        code == 0, 0.0, 10.0 ** (decade - (bits - 1)) * (0.1 + 0.9 * (code - levels + 0.5) / levels)
    )


def _bits(dtype: DTypeLike) -> int:
    return 8 if dtype == jnp.uint8 else 7
