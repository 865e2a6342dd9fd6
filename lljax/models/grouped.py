"""Grouped matrix product: each group of rows times the matrix of its expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256  # rows multiplied at one time by `blocked_dot`


def grouped_dot(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"], *, platform: str
) -> Float[Array, "M F"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] rows times w[1] ...

    Rows behind the last group have undefined results. The TPU compiler has a kernel
    (`jax.lax.ragged_dot`); on other platforms that operation holds x once for every expert, and a
    loop over blocks does not.
    """
    w = w.astype(x.dtype)
    if platform == "tpu":
        return jax.lax.ragged_dot(x, w, sizes)
    return blocked_dot(x, w, sizes)


@jax.custom_vjp
def blocked_dot(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """`grouped_dot` block by block: a product for each pair of a block and an expert with rows in
    it.
    """
    return _rows_times(x, w, sizes, "bd,df->bf")


def _forward(x, w, sizes):
    return blocked_dot(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
    x, w, sizes = saved

    def add(total, expert, start, of_expert, x, dy):
        return total.at[expert].add(
            jnp.einsum(
                "bd,bf->df",
                jnp.where(of_expert, x, 0),
                jnp.where(of_expert, dy, 0),
                preferred_element_type=jnp.float32,
            )
        )

    dw = _over_blocks(add, jnp.zeros(w.shape, jnp.float32), sizes, x, dy)
    return _rows_times(dy, w, sizes, "bf,df->bd"), dw.astype(w.dtype), None


blocked_dot.defvjp(_forward, _backward)


def _rows_times(x: jax.Array, w: jax.Array, sizes: jax.Array, einsum: str) -> jax.Array:
    M, F = x.shape[0], w.shape[2 if einsum.endswith("f") else 1]
    block = min(BLOCK, M)

    def write(out, expert, start, of_expert, x):
        others = jax.lax.dynamic_slice_in_dim(out, start, block)
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(of_expert, jnp.einsum(einsum, x, w[expert]), others), start, 0
        )

    return _over_blocks(write, jnp.zeros((M + -M % block, F), x.dtype), sizes, x)[:M]


def _over_blocks(f: Callable, carry: Any, sizes: Int[Array, " E"], *rows: jax.Array) -> Any:
    """carry = f(carry, expert, start, of_expert, *blocks) for each pair of a block and an expert
    with rows in it.

    start: first row of the block. of_expert: bool [block, 1], the rows of the expert. blocks: the
    rows of the block, of each of `rows` [M, ...].
    """
    M, E = rows[0].shape[0], sizes.shape[0]
    block = min(BLOCK, M)
    padded = [jnp.pad(x, ((0, -M % block), (0, 0))) for x in rows]
    ends = jnp.cumsum(sizes)
    first = (ends - sizes) // block
    meets = jnp.where(sizes > 0, (ends - 1) // block - first + 1, 0)
    pairs = jnp.cumsum(meets)

    def step(i, carry):
        expert = jnp.minimum(jnp.searchsorted(pairs, i, side="right"), E - 1)
        start = (first[expert] + i - (pairs - meets)[expert]) * block
        at = start + jnp.arange(block)
        of_expert = (at >= (ends - sizes)[expert]) & (at < ends[expert])
        return f(
            carry,
            expert,
            start,
            of_expert[:, None],
            *(jax.lax.dynamic_slice_in_dim(x, start, block) for x in padded),
        )

    return jax.lax.fori_loop(0, pairs[-1], step, carry)
