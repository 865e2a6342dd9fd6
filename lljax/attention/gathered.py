"""Context parallelism by gathering keys and values (allgather), and by exchanging heads for tokens
(ulysses). Both run inside shard_map.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.mask import Mask, of_keys
from lljax.attention.options import AttentionOptions
from lljax.attention.shard import HeadShare, Shard, attend_heads
from lljax.parallel.sharding import TOKENS


def attend_allgather(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    shard: Shard,
) -> Float[Array, "B T N H"]:
    """Every device gathers all keys and values: 2 T K H elements per row and layer. Liu et al.
    call the cost "relatively cheap".
    """

    def gather(x):
        x = jax.lax.all_gather(x, TOKENS, axis=1, tiled=True)
        return _in_order(x, shard.size) if shard.zigzag else x

    return attend_heads(q, gather(k), gather(v), of_keys(mask, gather), options, shard.heads())


def _in_order(x: jax.Array, size: int) -> jax.Array:
    """[B, S, ...] from the order of `lljax.parallel.sharding.zigzag` back into the order of the
    row. The mask would allow any; only so are the ranges of the blocks of a kernel narrow.
    """
    # chunk j is with device i = min(j, 2 size - 1 - j), its first or its second
    chunks = jnp.split(x, 2 * size, axis=1)
    return jnp.concatenate(
        [chunks[2 * min(j, 2 * size - 1 - j) + (j >= size)] for j in range(2 * size)], axis=1
    )


def ulysses_size(size: int, N: int, K: int) -> int:
    """Devices among which heads are exchanged: as many of the `size` as both kinds of heads can be
    dealt to.
    """
    return math.gcd(size, math.gcd(N, K))


def attend_ulysses(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    shard: Shard,
) -> Float[Array, "B T N H"]:
    """Heads are exchanged for tokens, so that a device attends for some heads over all tokens
    (Jacobs et al. 2023, arXiv 2309.14509). With more devices than heads divide, the rest of the
    keys is gathered.
    """
    u = ulysses_size(shard.size, q.shape[2], k.shape[2])
    rest = shard.size // u
    exchange = [[i * u + j for j in range(u)] for i in range(rest)]  # who exchange heads
    same_heads = [[i * u + j for i in range(rest)] for j in range(u)]  # afterwards
    deal = functools.partial(
        jax.lax.all_to_all,
        axis_name=TOKENS,
        split_axis=2,
        concat_axis=1,
        tiled=True,
        axis_index_groups=exchange,
    )

    def gather(x, devices):
        return jax.lax.all_gather(x, TOKENS, axis=1, tiled=True, axis_index_groups=devices)

    place, dealt = jax.lax.axis_index(TOKENS) % u, q.shape[2] // u
    if options.sinks is not None:
        sinks = jax.lax.dynamic_slice_in_dim(options.sinks, place * dealt, dealt)
        options = options.replace(sinks=sinks)
    q, k, v = deal(q), deal(k), deal(v)
    mask = jax.tree.map(lambda x: gather(x, exchange), mask)
    if rest > 1:
        k, v = gather(k, same_heads), gather(v, same_heads)
        mask = of_keys(mask, lambda x: gather(x, same_heads))
    heads = shard.heads()
    share = HeadShare(shard.groups, heads.count * u, heads.index * u + place)
    out = attend_heads(q, k, v, mask, options, share)
    return jax.lax.all_to_all(
        out, TOKENS, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=exchange
    )
