"""A table [V, D] (embedding, head; a factor [V, R] of one) whose rows are spread over the devices
that share the tokens of a batch row.

No device ever holds more than two slices of it: the slices go round, as keys and values do in ring
  attention. Bytes moved are those of the table, whatever the length of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lljax.parallel.sharding import ROWS, TOKENS, VOCABULARY, Layout

CHUNK = 8192  # tokens whose float32 gradients exist at one time


def slices(mesh: Mesh) -> int:
    """Into how many slices a table is cut."""
    return mesh.shape["tensor"] * mesh.shape[TOKENS]


def spread(table, mesh: Mesh):
    """`table`, or a tuple of tables, with zeros below, so that the rows can be dealt evenly."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % slices(mesh)), (0, 0))), table)


def around(f, carry, table, n: int):
    """Inside shard_map: f(carry, slice, its first row) -> carry for each of the n slices of a
    table, or of a tuple of tables; every device begins with its own.
    """
    rows = len(jax.tree.leaves(table)[0])

    def one(carry, step):
        carry, part = carry
        following = passed_on(part, n)  # under way while this slice is computed with
        return (f(carry, part, _first_row(step, n, rows)), following), None

    if n > 1:
        (carry, table), _ = jax.lax.scan(one, (carry, table), jnp.arange(n - 1))
    return f(carry, table, _first_row(n - 1, n, rows))


def passed_on(x, n: int):
    """The x (arrays) of the device before this one, of n."""
    return x if n == 1 else jax.lax.ppermute(x, VOCABULARY, [(i, (i + 1) % n) for i in range(n)])


def lookup(table: jax.Array, tokens: jax.Array, *, dtype, layout: Layout | None) -> jax.Array:
    """table[tokens] for table [V, D] and tokens [B, T]: [B, T, D] in `dtype`."""
    if layout is None:
        return _lookup(table, tokens, dtype, 1)
    n = slices(layout.mesh)
    return jax.shard_map(
        lambda table, tokens: _lookup(table, tokens, dtype, n),
        mesh=layout.mesh,
        check_vma=False,
        in_specs=(PartitionSpec(VOCABULARY), PartitionSpec(ROWS, TOKENS)),
        out_specs=PartitionSpec(ROWS, TOKENS),
    )(spread(table, layout.mesh), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table, tokens, dtype, n):
    """table [V / n, D]: the slice of this device."""

    def of_slice(x, part, first):
        at, inside = tokens - first, _inside(tokens, first, len(part))
        return jnp.where(
            inside[..., None], jnp.take(part, at, axis=0, mode="clip").astype(dtype), x
        )

    return around(of_slice, jnp.zeros((*tokens.shape, table.shape[1]), dtype), table, n)


def _forward(table, tokens, dtype, n):
    return _lookup(table, tokens, dtype, n), (table, tokens)


def _backward(dtype, n, saved, d_x):
    """The gradient of a slice goes round, each device adding that of its tokens; a chunk of it is
    float32 at one time.
    """
    table, tokens = saved  # of the table only the shape is used: nothing is kept for it
    rows = len(table)
    chunk = min(CHUNK, tokens.size)
    more = -tokens.size % chunk
    d_x = jnp.pad(d_x.reshape(tokens.size, -1), ((0, more), (0, 0))).reshape(
        -1, chunk, d_x.shape[-1]
    )
    tokens = jnp.pad(tokens.reshape(-1), (0, more)).reshape(-1, chunk)

    def of_slice(d_part, step):
        first = _first_row(step, n, rows)

        def of_chunk(d_part, xs):
            tokens, d_x = xs
            at = jnp.where(_inside(tokens, first, rows), tokens - first, rows)
            return d_part.at[at].add(d_x.astype(d_part.dtype), mode="drop"), None

        return passed_on(jax.lax.scan(of_chunk, d_part, (tokens, d_x))[0], n), None

    return jax.lax.scan(of_slice, jnp.zeros_like(table), jnp.arange(n))[0], None


_lookup.defvjp(_forward, _backward)


def _first_row(step, n: int, rows: int):
    """The row of the table with which the slice begins that a device holds after so many steps."""
    return (jax.lax.axis_index(VOCABULARY) - step) % n * rows if n > 1 else 0


def _inside(tokens, first, rows: int):
    return (tokens >= first) & (tokens < first + rows)
