"""Attention written down directly, with the dense T x S mask. For tests: every implementation must
equal it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.mask import Mask, visible
from lljax.attention.options import AttentionOptions
from lljax.attention.softcap import apply_softcap


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    options: AttentionOptions,
) -> Float[Array, "B T N H"]:
    """Attention of q over k and v; a query that sees nothing gets zeros."""
    see, sinks = visible(mask)[:, None], options.sinks
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(see, apply_softcap(scores * options.scale, options.softcap), -1e30)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : see.shape[-1]] * see
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)
