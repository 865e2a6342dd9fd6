"""GPTQ: kernels rounded one input at a time, the error of each pushed into the inputs that follow.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with static act-order: the inputs are rounded by
decreasing size, and each keeps the group of its place.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.compression.rounding import Grid, Rounded, Stored, encode, grid_of, round_to_nearest
from lljax.interop.layouts import Scheme

BLOCK = 128  # inputs whose error is pushed into the rest together
# Shares of the mean of the diagonal that are added to it, until the matrix can be inverted.
DAMPS = (0.01, 0.1, 1.0)


class Solution(NamedTuple):
    """damp: the share that was added to the diagonal; None if no inverse was found and the kernel
    is rounded to nearest.
    """

    rounded: Rounded
    damp: float | None


def gptq(
    kernel: Float[Array, "I O"],
    gram: Float[Array, "I I"],
    *,
    scheme: Scheme,
    stored: Stored,
    search: bool,
) -> Solution:
    """The codes of a kernel whose error is least on the inputs X with gram = X^T X.

    An input that is always 0 gets zero weights.
    """
    for damp in DAMPS:
        rounded, sound = solve(kernel, gram, damp, scheme=scheme, stored=stored, search=search)
        if sound:
            return Solution(rounded, damp)
    return Solution(round_to_nearest(kernel, scheme=scheme, stored=stored, search=search), None)


@functools.partial(jax.jit, static_argnames=("scheme", "stored", "search"))
def solve(kernel, gram, damp, *, scheme, stored, search) -> tuple[Rounded, jax.Array]:
    """The rounded kernel, and whether the damped matrix could be inverted."""
    inputs = len(kernel)
    grid = grid_of(kernel, scheme, stored, search)
    diagonal = jnp.diagonal(gram)
    mean = jnp.mean(diagonal)
    dead = diagonal == 0
    weights = jnp.where(dead[:, None], 0.0, kernel.astype(jnp.float32))
    order = jnp.argsort(-diagonal)
    damped = gram + jnp.diag(jnp.where(dead, mean, 0.0) + damp * mean)
    upper = inverse_factor(damped[order][:, order])
    sound = jnp.isfinite(upper).all() & (mean > 0)
    codes = _round_in_order(weights[order], upper, order * len(grid.scale) // inputs, grid, scheme)
    return Rounded(jnp.zeros_like(codes).at[order].set(codes), grid), sound


def inverse_factor(matrix: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """The upper triangular U with U^T U = matrix^-1; not finite if the matrix is not positive.

    From the Cholesky factor L of the matrix with its rows and columns reversed: U is L^-1,
    reversed.
    """
    lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(
        lower, jnp.eye(len(matrix), dtype=matrix.dtype), lower=True
    )
    return inverse[::-1, ::-1]


def _round_in_order(
    weights: Float[Array, "I O"],
    upper: Float[Array, "I I"],
    group: jax.Array,
    grid: Grid,
    scheme: Scheme,
) -> Float[Array, "I O"]:
    """The codes of weights whose inputs are in the order of rounding. group: of each input."""
    inputs, outputs = weights.shape
    block = max(n for n in range(1, BLOCK + 1) if inputs % n == 0)

    def round_block(b, carry):
        weights, codes = carry
        rows = jax.lax.dynamic_slice(weights, (b * block, 0), (block, outputs))
        to_all = jax.lax.dynamic_slice(upper, (b * block, 0), (block, inputs))
        inside = jax.lax.dynamic_slice(to_all, (0, b * block), (block, block))
        groups = jax.lax.dynamic_slice(group, (b * block,), (block,))

        def round_input(i, carry):
            rows, block_codes, errors = carry
            scale, zero = (x[groups[i]] for x in grid)
            code = encode(rows[i], scale, zero, scheme)
            error = (rows[i] - (code - zero) * scale) / inside[i, i]
            # Rows before i have no more use: `inside` is 0 there.
            rows = rows - inside[i][:, None] * error
            return rows, block_codes.at[i].set(code), errors.at[i].set(error)

        nothing = jnp.zeros_like(rows)
        _, block_codes, errors = jax.lax.fori_loop(0, block, round_input, (rows, nothing, nothing))
        weights = weights - jnp.matmul(to_all.T, errors, precision="highest")
        return weights, jax.lax.dynamic_update_slice(codes, block_codes, (b * block, 0))

    start = weights, jnp.zeros_like(weights)
    return jax.lax.fori_loop(0, inputs // block, round_block, start)[1]
