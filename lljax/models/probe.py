"""A weight that trains though its gradient never exists: a zero beside it tells the gradient in a
subspace, as the factor of an adapter would.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lljax.models.quantize import Quantised, dense
from lljax.parallel.sharded_embedding import lookup
from lljax.parallel.sharding import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probed:
    """A weight W [..., in, out] plus a product that is zero, in the place of its value; G is its
    gradient.

    inputs: projection [..., in, R] and probe [..., R, out], whose gradient is projection^T G; else
      projection [..., out, R] and probe [..., in, R], whose gradient is G projection.
    """

    base: jax.Array | Quantised
    projection: jax.Array | Quantised
    probe: jax.Array
    inputs: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def factors(self) -> tuple[jax.Array, jax.Array]:
        """[..., in, R] and [..., R, out] of a dense one: what is added is their product."""
        return (
            (self.projection, self.probe)
            if self.inputs
            else (self.probe, jnp.swapaxes(self.projection, -1, -2))
        )

    def dense(self, dtype) -> "Probed":
        return Probed(
            *(dense(x, dtype) for x in (self.base, self.projection)),
            self.probe.astype(dtype),
            self.inputs,
        )

    def each(self, f, axes: tuple):
        """See `Quantised.each`."""
        *lead, inputs, outputs = axes
        projected, probed = (
            ((inputs, None), (None, outputs)) if self.inputs else ((outputs, None), (inputs, None))
        )
        parts = (
            (self.base, axes),
            (self.projection, (*lead, *projected)),
            (self.probe, (*lead, *probed)),
        )
        return Probed(
            *(x.each(f, of) if hasattr(x, "each") else f(x, of) for x, of in parts), self.inputs
        )


def times(x: jax.Array, weight, dot=jnp.matmul) -> jax.Array:
    """x [..., in] by a dense weight [in, out], in the dtype of x. dot: the product."""
    if not isinstance(weight, Probed):
        return dot(x, weight.astype(x.dtype))
    left, right = weight.factors
    return dot(x, weight.base.astype(x.dtype)) + dot(
        dot(x, left.astype(x.dtype)), right.astype(x.dtype)
    )


def rows(table, tokens: jax.Array, *, dtype, layout: Layout | None) -> jax.Array:
    """The rows of a dense table [V, D], see `lljax.parallel.sharded_embedding.lookup`. The gradient
    of a probe is summed over all places of a token, in float32.
    """
    if not isinstance(table, Probed):
        return lookup(table, tokens, dtype=dtype, layout=layout)
    left, right = table.factors
    return lookup(table.base, tokens, dtype=dtype, layout=layout) + lookup(
        left.astype(jnp.float32), tokens, dtype=dtype, layout=layout
    ) @ right.astype(dtype)


def side_by_side(x: jax.Array, table) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Arrays [..., D'] and tables [V, D'] whose products make up that of x [..., D] and a dense
    table [V, D].
    """
    if not isinstance(table, Probed):
        return (x,), (table,)
    left, right = table.factors
    return (x, x @ right.T.astype(x.dtype)), (table.base, left)
