"""Attention written down directly, with the dense T x S mask. For tests: everything else must equal
it.
"""

import jax
import jax.numpy as jnp

from lljax.attention.mask import Mask, visible
from lljax.attention.softcap import capped


def attend(
    q, k, v, mask: Mask, *, scale: float, softcap: float | None = None, sinks=None
) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H]; a query that sees nothing gets zeros."""
    see = visible(mask)[:, None]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(see, capped(scores, softcap), -1e30)
    if sinks is not None:
        scores = jnp.concatenate(
            [scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], axis=-1
        )
    weights = jax.nn.softmax(scores, axis=-1)[..., : see.shape[-1]] * see
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)
