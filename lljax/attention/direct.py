"""Attention of a few queries over many keys, as decoding needs it: every key and value is read
once, and the scores of all keys exist at the same time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.mask import Mask, visible
from lljax.attention.options import AttentionOptions
from lljax.attention.softcap import apply_softcap

MOST = 4  # queries of a row: scores take T * S * N * 4 bytes
MASKED = -1e30


def refuses(q: jax.Array, k: jax.Array, mask: Mask, options: AttentionOptions) -> str:
    """Why it is not for q [B, T, N, H]; "" if it is."""
    return f"{q.shape[1]} queries a row, only up to {MOST}" if q.shape[1] > MOST else ""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    options: AttentionOptions,
) -> Float[Array, "B T N H"]:
    """Attention of q over k and v. A query that sees nothing gets zeros."""
    B, T, N, H = q.shape
    q = (q * jnp.asarray(options.scale, q.dtype)).reshape(B, T, -1, N // k.shape[2], H)
    # float32, as in every other implementation
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    see = visible(mask)[:, None, None]
    scores = jnp.where(see, apply_softcap(scores, options.softcap), MASKED)
    highest = scores.max(axis=-1, keepdims=True)
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.reshape(q.shape[2:4])[..., None, None]
        highest = jnp.maximum(highest, sinks)
    weights = jnp.where(see, jnp.exp(scores - highest), 0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - highest)
    out = jnp.einsum(
        "BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out / jnp.where(total > 0, total, 1)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q.dtype)
