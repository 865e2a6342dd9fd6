"""Embeddings and heads of several models, of which every row of a batch uses one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.models.quantize import dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """tables: the different tables [V, D]. number: the table of each model [A], or of each row [B]
    (`of_rows`).
    """

    tables: tuple[Any, ...]
    number: Int[Array, " A"]

    @property
    def dtype(self) -> Any:
        return self.tables[0].dtype

    def of_rows(self, models: Int[Array, " B"]) -> "Tables":
        return dataclasses.replace(self, number=self.number[models])

    def dense(self, dtype: Any) -> "Tables":
        return dataclasses.replace(self, tables=tuple(dense(table, dtype) for table in self.tables))

    def lookup(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The embeddings of `tokens`, each row's in its own table."""
        found = jnp.stack([jnp.take(table, tokens, axis=0) for table in self.tables])
        return found[self.number, jnp.arange(len(tokens))].astype(dtype)

    def logits(self, hidden: Float[Array, "B ... D"]) -> Float[Array, "B ... V"]:
        """The product of each row with its own table, float32. A table that no row uses is not
        read.
        """
        shape = (*hidden.shape[:-1], self.tables[0].shape[0])
        logits = jnp.zeros(shape, jnp.float32)
        for i, table in enumerate(self.tables):
            mine = self.number == i
            product = functools.partial(table_product, hidden, table)
            wanted = jax.lax.cond(jnp.any(mine), product, functools.partial(jnp.zeros, shape))
            logits = jnp.where(mine.reshape(-1, *[1] * (hidden.ndim - 1)), wanted, logits)
        return logits


def table_product(
    hidden: Float[Array, "... D"], table: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    """hidden @ table^T, float32."""
    return jnp.einsum(
        "...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
