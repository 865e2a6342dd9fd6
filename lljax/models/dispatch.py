"""Tokens to their experts and back, without dropping a token.

The pairs of a token and an expert are sorted by expert. `spread` gathers the rows of the tokens in
that order, the experts multiply them group by group, and `collect` sums the rows of each token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.models.router import Routing


def combine(
    experts: Callable,
    x: Float[Array, "M D"],
    routing: Routing,
    key: jax.Array | None,
    *,
    E: int,
    on_input: bool,
    platform: str,
    share: Int[Array, ""] | int = 0,
    shares: int = 1,
) -> Float[Array, "M D"]:
    """The weighted sum of the outputs of the experts at hand for each token, float32.

    experts: `lljax.models.moe.Experts`, E of them, the `share`-th of `shares` equal parts of all.
    on_input: the weight multiplies the input of an expert. At most M k / shares of the M k pairs of
    a token and an expert exist at one time, however many fall to this part.
    """
    weights, choice = routing.weights, routing.experts
    M, k = choice.shape
    rows = M * k // shares
    local = choice.reshape(-1) - share * E
    local = jnp.where((local >= 0) & (local < E), local, E)  # E: experts of other parts, last
    order = jnp.argsort(local, stable=True)  # place -> pair
    place = (
        jnp.zeros_like(order).at[order].set(jnp.arange(M * k), unique_indices=True).reshape(M, k)
    )
    ends = jnp.cumsum(jnp.bincount(local, length=E + 1)[:E])

    def piece(first):
        at = first + jnp.arange(rows)
        pair = jnp.where(at < ends[-1], jax.lax.dynamic_slice_in_dim(order, first, rows), M * k)
        row = jnp.where(
            (place >= first) & (place < jnp.minimum(first + rows, ends[-1])), place - first, rows
        )
        sizes = jnp.diff(jnp.clip(ends - first, 0, rows), prepend=0)
        inside = spread(x, pair, row)
        if on_input:
            inside = (
                inside * weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)[:, None]
            ).astype(x.dtype)
        outside = experts(inside, sizes, key, platform)
        return collect(outside, jnp.ones_like(weights) if on_input else weights, pair, row)

    if shares == 1:
        return piece(0)
    # Balanced experts fill one piece and a little of a second one.
    piece = jax.checkpoint(piece, prevent_cse=False)

    def add(total, first):
        return jax.lax.cond(first < ends[-1], lambda: total + piece(first), lambda: total), None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), jnp.arange(shares) * rows)[0]


# The rows of a token and the token of a row, each by a gather: the gradient of one is the other.
# (The gradient of jax's gather is a scatter, which a GPU sums in no fixed order.) pair int32 [R]:
# token * k + j of each row; row int32 [M, k]: row of each pair. An index out of range stands for no
# pair or no row, and reads zeros.


@jax.custom_vjp
def spread(
    x: Float[Array, "M D"], pair: Int[Array, " R"], row: Int[Array, "M k"]
) -> Float[Array, "R D"]:
    """The token of each row."""
    return _take(x, pair // row.shape[1])


@jax.custom_vjp
def collect(
    y: Float[Array, "R D"],
    weights: Float[Array, "M k"],
    pair: Int[Array, " R"],
    row: Int[Array, "M k"],
) -> Float[Array, "M D"]:
    """The weighted sum of the rows of each token, float32."""
    return _sum(y, weights, row)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    return x.at[at].get(mode="fill", fill_value=0)


def _sum(y: jax.Array, weights: jax.Array, row: jax.Array) -> jax.Array:
    total: Any = 0
    for j in range(row.shape[1]):  # one [M, D] at a time
        total += _take(y, row[:, j]) * weights[:, j, None]
    return total


def _spread_backward(saved, dy):
    pair, row, like = saved
    return _sum(dy, jnp.ones(row.shape, jnp.float32), row).astype(like.dtype), None, None


def _collect_backward(saved, dx):
    y, weights, pair, row = saved
    of_pair = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)
    dy = (_take(dx, pair // row.shape[1]) * of_pair[:, None]).astype(y.dtype)
    d_weights = jnp.stack(
        [jnp.sum(_take(y, row[:, j]) * dx, axis=-1) for j in range(row.shape[1])], axis=1
    )
    return dy, d_weights, None, None


spread.defvjp(
    lambda x, pair, row: (spread(x, pair, row), (pair, row, jnp.zeros(0, x.dtype))),
    _spread_backward,
)
collect.defvjp(
    lambda y, weights, pair, row: (collect(y, weights, pair, row), (y, weights, pair, row)),
    _collect_backward,
)
