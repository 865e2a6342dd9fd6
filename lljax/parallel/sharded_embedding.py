"""Embedding and head tables [V, D], or their low-rank factors [V, R], whose rows are sharded over
the devices that share the tokens of a batch row.

No device ever holds more than two slices of a table: the slices go round, as keys and values do in
ring attention. The bytes moved are the size of the table, whatever the length of the row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from lljax.parallel.sharding import ROWS, TOKENS, VOCABULARY, Layout

CHUNK = 8192  # tokens whose float32 gradients exist at one time


def slice_count(mesh: Mesh) -> int:
    """The number of slices of a table."""
    return mesh.shape["tensor"] * mesh.shape[TOKENS]


def pad_rows(table, mesh: Mesh):
    """`table`, or a tuple of tables, padded with rows of zeros to slices of equal size."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % slice_count(mesh)), (0, 0))), table)


def fold_slices(f: Callable, carry, table, n: int) -> Any:
    """Inside shard_map: carry = f(carry, slice, its first row) for each of the n slices of a table,
    or of a tuple of tables; every device begins with the slice that it holds.
    """
    rows = len(jax.tree.leaves(table)[0])

    def body(carry, step):
        carry, part = carry
        following = send_next(part, n)  # under way while this slice is computed with
        return (f(carry, part, _first_row(step, n, rows)), following), None

    if n > 1:
        (carry, table), _ = jax.lax.scan(body, (carry, table), jnp.arange(n - 1))
    return f(carry, table, _first_row(n - 1, n, rows))


def send_next(x, n: int):
    """Sends the arrays `x` to the next of n devices, and returns the arrays received."""
    return x if n == 1 else jax.lax.ppermute(x, VOCABULARY, [(i, (i + 1) % n) for i in range(n)])


def lookup(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    *,
    dtype: jax.typing.DTypeLike,
    layout: Layout | None,
) -> Float[Array, "B T D"]:
    """table[tokens] in `dtype`."""
    if layout is None:
        return _lookup(table, tokens, dtype, 1)
    n = slice_count(layout.mesh)
    return jax.shard_map(
        lambda table, tokens: _lookup(table, tokens, dtype, n),
        mesh=layout.mesh,
        check_vma=False,
        in_specs=(PartitionSpec(VOCABULARY), PartitionSpec(ROWS, TOKENS)),
        out_specs=PartitionSpec(ROWS, TOKENS),
    )(pad_rows(table, layout.mesh), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike, n: int):
    """table [V / n, D]: the slice of this device."""

    def add_rows(x: jax.Array, part: jax.Array, first):
        rows = jnp.take(part, tokens - first, axis=0, mode="clip").astype(dtype)
        return jnp.where(_inside(tokens, first, len(part))[..., None], rows, x)

    return fold_slices(add_rows, jnp.zeros((*tokens.shape, table.shape[1]), dtype), table, n)


def _forward(table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike, n: int):
    return _lookup(table, tokens, dtype, n), (table, tokens)


def _backward(dtype: jax.typing.DTypeLike, n: int, saved, d_x: jax.Array):
    """The gradient of a slice goes round, and each device adds the gradient of its tokens, in
    float32 a chunk at a time.
    """
    table, tokens = saved  # only the shape of the table is used: nothing is saved for it
    rows = len(table)
    chunk = min(CHUNK, tokens.size)
    padding = -tokens.size % chunk
    d_x = jnp.pad(d_x.reshape(tokens.size, -1), ((0, padding), (0, 0)))
    d_x = d_x.reshape(-1, chunk, d_x.shape[-1])
    tokens = jnp.pad(tokens.reshape(-1), (0, padding)).reshape(-1, chunk)

    def add_slice(d_part: jax.Array, step):
        first = _first_row(step, n, rows)

        def add_chunk(d_part: jax.Array, xs):
            tokens, d_x = xs
            at = jnp.where(_inside(tokens, first, rows), tokens - first, rows)
            return d_part.at[at].add(d_x.astype(d_part.dtype), mode="drop"), None

        return send_next(jax.lax.scan(add_chunk, d_part, (tokens, d_x))[0], n), None

    return jax.lax.scan(add_slice, jnp.zeros_like(table), jnp.arange(n))[0], None


_lookup.defvjp(_forward, _backward)


def _first_row(step, n: int, rows: int):
    """The first row of the slice that a device holds after so many steps."""
    return (jax.lax.axis_index(VOCABULARY) - step) % n * rows if n > 1 else 0


def _inside(tokens: jax.Array, first, rows: int):
    return (tokens >= first) & (tokens < first + rows)
