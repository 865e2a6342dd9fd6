"""A table [V, D] (embedding, head) whose rows are spread over the devices that share the tokens of a batch row.

No device ever holds more than two slices of it: the slices go round, as keys and values do in ring attention. Bytes moved are
those of the table, whatever the length of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lljax.sharding import ROWS, TOKENS, VOCABULARY, Layout

CHUNK = 8192                                 # tokens whose float32 gradients exist at one time


def slices(mesh: Mesh) -> int:
    """Into how many slices a table is cut."""
    return mesh.shape["tensor"] * mesh.shape[TOKENS]


def spread(table: jax.Array, mesh: Mesh) -> jax.Array:
    """`table` with zeros below, so that its rows can be dealt evenly."""
    return jnp.pad(table, ((0, -len(table) % slices(mesh)), (0, 0)))


def around(f, carry, table: jax.Array, n: int):
    """Inside shard_map: f(carry, slice, its first row) -> carry for each of the n slices; every device begins with its own."""
    if n == 1:
        return f(carry, table, 0)
    at = jax.lax.axis_index(VOCABULARY)

    def one(carry, step):
        carry, part = carry
        following = passed_on(part, n)       # under way while this slice is computed with
        return (f(carry, part, (at - step) % n * len(part)), following), None
    (carry, part), _ = jax.lax.scan(one, (carry, table), jnp.arange(n - 1))
    return f(carry, part, (at + 1) % n * len(part))


def passed_on(x: jax.Array, n: int) -> jax.Array:
    """The x of the device before this one, of n."""
    return x if n == 1 else jax.lax.ppermute(x, VOCABULARY, [(i, (i + 1) % n) for i in range(n)])


def lookup(table: jax.Array, tokens: jax.Array, *, dtype, layout: Layout | None) -> jax.Array:
    """table[tokens] for table [V, D] and tokens [B, T]: [B, T, D] in `dtype`."""
    if layout is None:
        return _rows(table, tokens, 0, dtype)
    n = slices(layout.mesh)

    @functools.partial(jax.shard_map, mesh=layout.mesh, check_vma=False, out_specs=PartitionSpec(ROWS, TOKENS),
                       in_specs=(PartitionSpec(VOCABULARY), PartitionSpec(ROWS, TOKENS)))
    def of_device(table, tokens):
        x = jnp.zeros((*tokens.shape, table.shape[1]), dtype)
        return around(lambda x, part, first: x + _rows(part, tokens, first, dtype), x, table, n)
    return of_device(spread(table, layout.mesh), tokens)


def _rows(part, tokens, first, dtype):
    """Rows of a slice that begins with row `first` of the table; zeros for tokens of other slices."""
    def one(token):
        at = token - first
        return jnp.where((at >= 0) & (at < len(part)), jnp.take(part, at, axis=0, mode="clip"), 0).astype(dtype)
    return jax.lax.map(one, tokens.reshape(-1), batch_size=CHUNK).reshape(*tokens.shape, -1)
