"""Soft-capped scores: softcap * tanh(scores / softcap), Gemma 2, arXiv 2408.00118, section 2.

No cap if `softcap` is None.
"""

import jax
import jax.numpy as jnp


def apply_softcap(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def softcap_gradient(gradient: jax.Array, scores: jax.Array, softcap: float | None) -> jax.Array:
    """The gradient of the uncapped scores, from `gradient` of the capped `scores`; 0 for scores
    that a mask replaced by a number far beyond the cap.
    """
    if softcap is None:
        return gradient
    share = scores / softcap
    return gradient * (1 - jnp.minimum(share * share, 1.0))
