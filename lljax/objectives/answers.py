"""Sums over the answers of rows in which several answers share a prompt (lljax.data.groups)."""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.data.batch import IGNORED, Batch


def field(batch: Batch, name: str) -> Array:
    """A field of the batch of an objective, which `Batch` does not name."""
    return cast(dict[str, Array], batch)[name]


def answer_numbers(batch: Batch, roles: int) -> Int[Array, "B T"]:
    """A number for the answer of each token, below B * T * roles; tokens of prompts and padding
    have the number of an answer too, and no target.

    roles: the largest branch of a prompt. The numbers of a prompt's answers are consecutive, and
    begin with a multiple of `roles`.
    """
    B, T = batch["tokens"].shape
    rows = jnp.arange(B, dtype=jnp.int32)[:, None] * T
    groups = rows + jnp.maximum(batch["segments"] - 1, 0)
    return groups * roles + jnp.maximum(field(batch, "branches") - 1, 0)


def answer_sums(
    values: Float[Array, "B T"], batch: Batch, roles: int
) -> Float[Array, "groups roles"]:
    """Sums of `values` over the targets of every answer, float32, by prompt and branch. A prompt of
    a row has a place of its own; most places are empty.
    """
    B, T = batch["tokens"].shape
    values = jnp.where(batch["targets"] == IGNORED, 0, values.astype(jnp.float32))
    numbers = answer_numbers(batch, roles)
    sums = jax.ops.segment_sum(values.ravel(), numbers.ravel(), B * T * roles)
    return sums.reshape(-1, roles)


def answer_tokens(batch: Batch, roles: int) -> Float[Array, "groups roles"]:
    """The number of targets of every answer, as `answer_sums` orders them."""
    return answer_sums(jnp.ones(batch["tokens"].shape), batch, roles)


def one_pass(batch: Batch) -> Batch:
    """A batch of any shape [..., T] as one of [B, T]."""
    return cast(Batch, jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch))
