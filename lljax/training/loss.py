"""Next-token cross-entropy that never holds the logits of more than a chunk of tokens."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lljax.attention.softcap import capped, through_cap
from lljax.data.packing import IGNORED
from lljax.sharding import ROWS, TOKENS, Layout


def cross_entropy(hidden, head, targets, *, chunk: int, softcap: float | None = None,
                  layout: Layout | None = None) -> jax.Array:
    """Sum of the cross-entropies of `targets` [B, T] under hidden [B, T, D] and head [V, D]; float32 scalar.

    Ignored targets (-100) count for nothing, in the value and in both gradients. Memory is O(chunk x V). Where a
    gradient is asked for it is formed together with the value, so logits are computed once; that of the head is formed
    only if the head trains. softcap: of the logits, see lljax.attention.softcap. Logits, their softmax and the sums over
    chunks are float32.
    """
    if layout is None:
        return _in_chunks(hidden, head, targets, chunk, softcap)
    tokens = (TOKENS, "tensor")              # where heads are cut, the tokens of the loss are

    @functools.partial(jax.shard_map, mesh=layout.mesh, check_vma=False, out_specs=PartitionSpec(),
                       in_specs=(PartitionSpec(ROWS, tokens), PartitionSpec(), PartitionSpec(ROWS, tokens)))
    def of_all(hidden, head, targets):
        return jax.lax.psum(_in_chunks(hidden, head, targets, chunk, softcap), layout.mesh.axis_names)
    return of_all(hidden, head, targets)


def _in_chunks(hidden, head, targets, chunk, softcap):
    D = hidden.shape[-1]
    tokens = targets.size
    chunk = min(chunk, tokens)
    padded = -(-tokens // chunk) * chunk
    hidden = jnp.pad(hidden.reshape(tokens, D), ((0, padded - tokens), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(targets.reshape(tokens), (0, padded - tokens), constant_values=IGNORED).reshape(-1, chunk)
    return _cross_entropy(hidden, head, targets, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(hidden, head, targets, softcap):
    """hidden [chunks, C, D], head [V, D], targets [chunks, C]."""
    def one(total, xs):
        loss, _, _ = _chunk_loss(*xs, head, softcap)
        return total + loss, None
    return jax.lax.scan(one, jnp.float32(0), (hidden, targets))[0]


def _chunk_loss(hidden, targets, head, softcap):
    """Loss of one chunk, its logits [C, V] and their log-sum-exp [C, 1]."""
    logits = jnp.einsum("CD,VD->CV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = capped(logits, softcap)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    return jnp.sum(jnp.where(targets[:, None] == IGNORED, 0.0, lse - of_target)), logits, lse


def _forward(hidden, head, targets, softcap):
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden, head, targets, trained = hidden.value, head.value, targets.value, head.perturbed

    def one(carry, xs):
        total, d_head = carry
        h, t = xs
        loss, logits, lse = _chunk_loss(h, t, head, softcap)
        d_logits = jnp.exp(logits - lse) - jax.nn.one_hot(t, head.shape[0], dtype=jnp.float32)
        d_logits = through_cap(jnp.where(t[:, None] == IGNORED, 0.0, d_logits), logits, softcap).astype(h.dtype)
        d_hidden = wide("CV,VD->CD", d_logits, head.astype(h.dtype))
        if trained:
            d_head += wide("CV,CD->VD", d_logits, h)
        return (total + loss, d_head), d_hidden.astype(h.dtype)

    d_head = jnp.zeros(head.shape if trained else (), jnp.float32)
    (total, d_head), d_hidden = jax.lax.scan(one, (jnp.float32(0), d_head), (hidden, targets))
    return total, (d_hidden, d_head.astype(head.dtype) if trained else None)


def _backward(softcap, saved, d_total):
    d_hidden, d_head = saved
    return d_hidden * d_total.astype(d_hidden.dtype), None if d_head is None else d_head * d_total, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
