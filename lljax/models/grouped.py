"""Many matrices, each for its own rows: the product that experts are made of."""

import jax
import jax.numpy as jnp

BLOCK = 256  # rows that are multiplied at one time where the compiler has no such product


def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, *, platform: str) -> jax.Array:
    """Rows of x [M, D], the first sizes[0] of them times w[0], the next sizes[1] times w[1] ...:
    [M, F] of w [E, D, F].

    sizes: int32 [E]. What comes out for rows behind the last group is not to be read. The TPU's
      compiler has a kernel (`jax.lax.ragged_dot`); elsewhere that operation holds x once for every
      expert, and a loop over blocks does not.
    """
    w = w.astype(x.dtype)
    if platform == "tpu":
        return jax.lax.ragged_dot(x, w, sizes)
    return blocked_dot(x, w, sizes)


@jax.custom_vjp
def blocked_dot(x, w, sizes):
    """`grouped_dot` block by block; as many products as there are pairs of a block and an expert
    with rows in it.
    """
    return _rows_times(x, w, sizes, "bd,df->bf")


def _forward(x, w, sizes):
    return blocked_dot(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
    x, w, sizes = saved

    def add(total, expert, start, mine, x, dy):
        return total.at[expert].add(
            jnp.einsum(
                "bd,bf->df",
                jnp.where(mine, x, 0),
                jnp.where(mine, dy, 0),
                preferred_element_type=jnp.float32,
            )
        )

    dw = _over_blocks(add, jnp.zeros(w.shape, jnp.float32), sizes, x, dy)
    return _rows_times(dy, w, sizes, "bf,df->bd"), dw.astype(w.dtype), None


blocked_dot.defvjp(_forward, _backward)


def _rows_times(x, w, sizes, einsum: str):
    M, F = x.shape[0], w.shape[2 if einsum.endswith("f") else 1]
    block = min(BLOCK, M)

    def write(out, expert, start, mine, x):
        others = jax.lax.dynamic_slice_in_dim(out, start, block)
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine, jnp.einsum(einsum, x, w[expert]), others), start, 0
        )

    return _over_blocks(write, jnp.zeros((M + -M % block, F), x.dtype), sizes, x)[:M]


def _over_blocks(f, carry, sizes, *rows):
    """carry = f(carry, expert, start, mine, *blocks) for each pair of a block and an expert that
    owns some of its rows.

    start: of the block, in rows. mine: bool [block, 1], the rows of the expert. blocks: the rows of
      each of `rows` [M, ...].
    """
    M, E = rows[0].shape[0], sizes.shape[0]
    block = min(BLOCK, M)
    rows = [jnp.pad(x, ((0, -M % block), (0, 0))) for x in rows]
    ends = jnp.cumsum(sizes)
    first = (ends - sizes) // block
    meets = jnp.where(sizes > 0, (ends - 1) // block - first + 1, 0)
    pairs = jnp.cumsum(meets)

    def one(i, carry):
        expert = jnp.minimum(jnp.searchsorted(pairs, i, side="right"), E - 1)
        start = (first[expert] + i - (pairs - meets)[expert]) * block
        at = start + jnp.arange(block)
        mine = (at >= (ends - sizes)[expert]) & (at < ends[expert])
        return f(
            carry,
            expert,
            start,
            mine[:, None],
            *(jax.lax.dynamic_slice_in_dim(x, start, block) for x in rows),
        )

    return jax.lax.fori_loop(0, pairs[-1], one, carry)
