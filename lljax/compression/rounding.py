"""A kernel rounded to few bits: a scale for each group of inputs of an output, and codes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from lljax.interop.layouts import Codes, Scheme

LARGEST_E4M3 = 448.0
# Of the search for the best scale: 20 shares of the largest weight, and the norm of the error;
# compressed-tensors `observers/mse.py`.
SHARES = np.linspace(1.0, 0.81, 20, dtype=np.float32)
ERROR_NORM = 2.4


# The dtypes that scales are rounded to, one after the other: the model's, to which loaders cast
# them, and the file's.
Stored = tuple[Any, ...]


class Grid(NamedTuple):
    """The values that a kernel [in, out] may take: (code - zero) * scale.

    scale: float32 [groups, out], exact in the dtypes of `Stored`. zero: float32 [groups, out].
    """

    scale: jax.Array
    zero: jax.Array


class Rounded(NamedTuple):
    """codes: float32 [in, out], whole numbers, or e4m3 values. grid: see `Grid`."""

    codes: jax.Array
    grid: Grid

    def dense(self, scheme: Scheme) -> Float[Array, "I O"]:
        """The values, float32."""
        inputs = self.codes.shape[0]
        scale, zero = (over_inputs(x, inputs, scheme) for x in self.grid)
        return (self.codes - zero) * scale

    def to_codes(self, scheme: Scheme, stored: Stored) -> Codes:
        """Host arrays in the orientation of HF."""
        code_dtype = ml_dtypes.float8_e4m3fn if scheme.kind == "float" else np.uint8
        codes, scale, zero = (np.asarray(x).T for x in (self.codes, *self.grid))
        return Codes(
            codes=np.ascontiguousarray(codes.astype(code_dtype)),
            scale=np.ascontiguousarray(scale.astype(stored[-1])),
            zero=None if scheme.symmetric else np.ascontiguousarray(zero.astype(np.uint8)),
        )


def over_inputs(x: Float[Array, "G O"], inputs: int, scheme: Scheme) -> Float[Array, "I O"]:
    """A value of each group, for each of its inputs."""
    return jnp.repeat(x, inputs // len(x), axis=0, total_repeat_length=inputs)


def encode(x: jax.Array, scale: jax.Array, zero: jax.Array, scheme: Scheme) -> jax.Array:
    """The nearest codes of values, all float32."""
    if scheme.kind == "float":
        x = jnp.clip(x / scale, -LARGEST_E4M3, LARGEST_E4M3)
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.clip(jnp.round(x / scale) + zero, 0, 2**scheme.bits - 1)


def grid_of(kernel: Float[Array, "I O"], scheme: Scheme, stored: Stored, search: bool) -> Grid:
    """The scales and zero points of a kernel.

    Symmetric: the largest weight of a group is half the range of the codes, 7.5 for four bits;
    compressed-tensors `quantization/utils/helpers.py` calculate_qparams. Not symmetric: from the
    least to the largest weight. float: the largest weight of an output is 448.

    search: of 20 shares of the largest weight, takes the one with the least error of the group.
    """
    inputs, outputs = kernel.shape
    group = inputs if scheme.group == -1 else scheme.group
    grouped = kernel.astype(jnp.float32).reshape(-1, group, outputs)
    low = jnp.minimum(jnp.min(grouped, axis=1), 0)
    high = jnp.maximum(jnp.max(grouped, axis=1), 0)
    grid = functools.partial(_grid, scheme=scheme, stored=stored)
    if not search:
        return grid(low, high)

    def better(best, share):
        least, found = best
        tried = grid(low * share, high * share)
        scale, zero = (x[:, None] for x in tried)
        values = (encode(grouped, scale, zero, scheme) - zero) * scale
        error = jnp.sum(jnp.abs(values - grouped) ** ERROR_NORM, axis=1)
        is_less = error < least
        return (
            jnp.minimum(error, least),
            jax.tree.map(lambda new, old: jnp.where(is_less, new, old), tried, found),
        ), None

    start = jnp.full(low.shape, jnp.inf), grid(low, high)
    return jax.lax.scan(better, start, jnp.asarray(SHARES))[0][1]


def _grid(low: jax.Array, high: jax.Array, *, scheme: Scheme, stored: Stored) -> Grid:
    largest, steps = jnp.maximum(-low, high), 2**scheme.bits - 1
    if scheme.kind == "float":
        scale = largest / LARGEST_E4M3
    elif scheme.symmetric:
        scale = largest / (steps / 2)
    else:
        scale = (high - low) / steps
    # A group of zeros has any scale; the least is a normal number of the type that is stored.
    least = max(float(ml_dtypes.finfo(dtype).smallest_normal) for dtype in stored)
    scale = jnp.where(scale == 0, 1.0, jnp.maximum(scale, least))
    for dtype in stored:
        scale = scale.astype(dtype).astype(jnp.float32)
    if scheme.kind == "float":
        zero = jnp.zeros_like(scale)
    elif scheme.symmetric:
        zero = jnp.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        zero = jnp.clip(jnp.round(-low / scale), 0, steps)
    return Grid(scale, zero)


@functools.partial(jax.jit, static_argnames=("scheme", "stored", "search"))
def round_to_nearest(
    kernel: Float[Array, "I O"], *, scheme: Scheme, stored: Stored, search: bool
) -> Rounded:
    """Each weight by itself."""
    kernel = kernel.astype(jnp.float32)
    grid = grid_of(kernel, scheme, stored, search)
    scale, zero = (over_inputs(x, len(kernel), scheme) for x in grid)
    return Rounded(encode(kernel, scale, zero, scheme), grid)


@jax.jit
def output_error(
    kernel: Float[Array, "I O"], rounded: Float[Array, "I O"], gram: Float[Array, "I I"]
) -> Float[Array, ""]:
    """|X (W' - W)|^2 / |X W|^2 over the calibration tokens X, from gram = X^T X."""

    def energy(w):
        return jnp.sum(w * jnp.matmul(gram, w, precision="highest"))

    kernel = kernel.astype(jnp.float32)
    return energy(rounded - kernel) / jnp.maximum(energy(kernel), 1e-30)
