"""Low-rank gradients without the full gradient: differentiate with respect to a zero-valued probe P
in y = W x + P (Q x), which costs as much as the factor of an adapter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.models.quantize import dense
from lljax.parallel.sharded_embedding import lookup
from lljax.parallel.sharding import Layout, map_arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbedWeight:
    """The value of a weight W [..., in, out] whose gradient G is wanted in a subspace: W plus a
    product that is zero.

    inputs: projection [..., in, R] and probe [..., R, out], whose gradient is projection^T G; else
      projection [..., out, R] and probe [..., in, R], whose gradient is G projection.
    """

    base: Any  # an array or a quantized value
    projection: Any  # an array or a quantized value
    probe: jax.Array
    inputs: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def factors(self) -> tuple[jax.Array, jax.Array]:
        """[..., in, R] and [..., R, out], whose product is added to a dense W."""
        return (
            (self.projection, self.probe)
            if self.inputs
            else (self.probe, jnp.swapaxes(self.projection, -1, -2))
        )

    def dense(self, dtype: Any) -> "ProbedWeight":
        return ProbedWeight(
            base=dense(self.base, dtype),
            projection=dense(self.projection, dtype),
            probe=self.probe.astype(dtype),
            inputs=self.inputs,
        )

    def each(self, f: Callable, axes: tuple) -> "ProbedWeight":
        """See `Quantized.each`."""
        *lead, inputs, outputs = axes
        projected, probed = (
            ((inputs, None), (None, outputs)) if self.inputs else ((outputs, None), (inputs, None))
        )
        return ProbedWeight(
            base=map_arrays(f, self.base, axes),
            projection=map_arrays(f, self.projection, (*lead, *projected)),
            probe=f(self.probe, (*lead, *probed)),
            inputs=self.inputs,
        )


def multiply(
    x: Float[Array, "... I"], weight: jax.Array | ProbedWeight, dot: Callable = jnp.matmul
) -> Float[Array, "... O"]:
    """x by a dense weight [in, out], in the dtype of x. dot: the product."""
    if not isinstance(weight, ProbedWeight):
        return dot(x, weight.astype(x.dtype))
    left, right = weight.factors
    return dot(x, weight.base.astype(x.dtype)) + dot(
        dot(x, left.astype(x.dtype)), right.astype(x.dtype)
    )


def lookup_rows(
    table: jax.Array | ProbedWeight, tokens: Int[Array, "B T"], *, dtype: Any, layout: Layout | None
) -> Float[Array, "B T D"]:
    """The rows of a dense table [V, D], see `lljax.parallel.sharded_embedding.lookup`. The gradient
    of a probe is summed over all occurrences of a token, in float32.
    """
    if not isinstance(table, ProbedWeight):
        return lookup(table, tokens, dtype=dtype, layout=layout)
    left, right = table.factors
    return lookup(table.base, tokens, dtype=dtype, layout=layout) + lookup(
        left.astype(jnp.float32), tokens, dtype=dtype, layout=layout
    ) @ right.astype(dtype)


def product_terms(
    x: Float[Array, "... D"], table: jax.Array | ProbedWeight
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Arrays [..., D'] and tables [V, D'] whose products sum to the product of x and a dense table
    [V, D].
    """
    if not isinstance(table, ProbedWeight):
        return (x,), (table,)
    left, right = table.factors
    return (x, x @ right.T.astype(x.dtype)), (table.base, left)
