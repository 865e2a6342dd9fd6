"""Ring attention: keys and values go round, a neighbor at a time; memory is O(T / devices). Liu et
al. 2023, arXiv 2310.01889. Runs inside shard_map.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.attend import IMPLEMENTATIONS, Implementation, select, sink_gradient
from lljax.attention.mask import Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.shard import Shard, attend_heads, pass_on
from lljax.parallel.rounding import cdiv


def attend_ring(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    shard: Shard,
) -> Float[Array, "B T N H"]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, options: AttentionOptions):
        hops = shard.size - 1 if shard.zigzag else _hops(mask, q.shape[1], shard.size)
        ring = _Ring(hops, shard.size, options.replace(sinks=None))
        return cast(jax.Array, _ring(ring, q, k, v, mask, options.sinks))

    return attend_heads(q, k, v, mask, options, shard.heads(), attend=attend)


def _hops(mask: Mask, T: int, size: int) -> int:
    """How many neighbors back a query of a device of T tokens may look; the steps of the others
    would be empty. A branch looks back to the end of its trunk, which may be on any device.
    """
    if mask.q_trunks is not None:
        return size - 1
    limits = (size * T, mask.group, mask.window if mask.anchors is None else None)
    reach = min(limit for limit in limits if limit is not None)
    return min(size - 1, cdiv(reach - 1, T))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """hops: how often keys and values are passed on among `size` devices. options: without sinks,
    which are differentiated.
    """

    hops: int
    size: int
    options: AttentionOptions

    def implementation(self, q: jax.Array, k: jax.Array, mask: Mask) -> Implementation:
        """The pair that attends to one chunk of the keys, whose tokens are not the queries'."""
        return IMPLEMENTATIONS[select(q, k, mask.replace(ordered=False), self.options)]

    @property
    def arguments(self) -> dict:
        return {"scale": self.options.scale, "softcap": self.options.softcap}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks):
    return _ring_forward(ring, q, k, v, mask, sinks)[0]


def _chunk(k: jax.Array, v: jax.Array, mask: Mask) -> tuple:
    """The arrays that go round: keys, values, and their part of the mask."""
    return k, v, mask.k_index, mask.k_segments, mask.anchors


def _with_keys(mask: Mask, k_index, k_segments, anchors) -> Mask:
    return mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors)


def _ring_forward(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks):
    forward, _ = ring.implementation(q, k, mask).pair

    def attend_chunk(out: jax.Array, lse: jax.Array, chunk):
        """Merges attention over one chunk into the output and its log-sum-exp, in float32."""
        k, v, *keys = chunk
        chunk_out, chunk_lse = forward(q, k, v, _with_keys(mask, *keys), **ring.arguments)
        total = jnp.logaddexp(lse, chunk_lse)
        weight, chunk_weight = (jnp.exp(x - total)[..., None] for x in (lse, chunk_lse))
        return out * weight + chunk_out * chunk_weight, total

    def step(carry, _):
        out, lse, chunk = carry
        following = pass_on(chunk, ring.size)  # under way while this chunk is computed with
        return (*attend_chunk(out, lse, chunk), following), None

    # A sink is a key that every query has seen already.
    first = -jnp.inf if sinks is None else sinks
    out, lse = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], first, jnp.float32)
    (out, lse, chunk), _ = jax.lax.scan(step, (out, lse, _chunk(k, v, mask)), length=ring.hops)
    out, lse = attend_chunk(out, lse, chunk)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, sinks, out, lse)


def _ring_backward(ring: _Ring, saved, d_out: jax.Array):
    q, k, v, mask, sinks, out, lse = saved
    _, backward = ring.implementation(q, k, mask).pair

    def chunk_gradients(chunk):
        k, v, *keys = chunk
        operands = (q, k, v, _with_keys(mask, *keys), (out, lse), d_out)
        return backward(*operands, **ring.arguments)

    def step(carry, _):
        dq, chunk, d_chunk = carry
        following = pass_on(chunk, ring.size)
        dq_part, *d_part = chunk_gradients(chunk)
        d_chunk = pass_on(jax.tree.map(jnp.add, d_chunk, tuple(d_part)), ring.size)
        return (dq + dq_part, following, d_chunk), None

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    start = (jnp.zeros(q.shape, jnp.float32), _chunk(k, v, mask), empty)
    (dq, chunk, d_chunk), _ = jax.lax.scan(step, start, length=ring.hops)
    dq_part, *d_part = chunk_gradients(chunk)
    d_chunk = jax.tree.map(jnp.add, d_chunk, tuple(d_part))
    dk, dv = pass_on(d_chunk, ring.size, by=-ring.hops)
    dq, dk, dv = (dq + dq_part).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return dq, dk, dv, None, sink_gradient(sinks, out, lse, d_out)


_ring.defvjp(_ring_forward, _ring_backward)
