"""How evenly the tokens of a pass are spread over the experts."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balancing_loss(load: Float[Array, "L 2 E"], tokens: Array) -> Float[Array, ""]:
    """The load-balancing loss E * sum_e f_e P_e, float32; k if experts share the `tokens` evenly.

    load: the load of each layer with experts, counted over `tokens` (lljax.models.decoder).

    Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, as in transformers' `load_balancing_loss_func`:
    f_e is how many times a token chose expert e, P_e its probability, each the mean over tokens and
    layers. The scores of a sigmoid router are first made to sum to 1 (DeepSeek-AI 2024, arXiv
    2412.19437, eq. 19 and 20), and the mean is over all rows of the pass, not over each row.
    """
    f, P = jnp.sum(load, axis=0) / (len(load) * jnp.maximum(tokens, 1))
    return load.shape[2] * jnp.sum(f * P)


def expert_load_max(load: Float[Array, "L 2 E"]) -> Float[Array, ""]:
    """The tokens of the busiest expert of a layer over its even share; 1 if all get the same, at
    most E / k.
    """
    chosen = load[:, 0]
    total = jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)
    return chosen.shape[1] * jnp.max(chosen / total)
