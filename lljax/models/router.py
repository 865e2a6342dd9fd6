"""Which experts a token goes to, and how often each expert was chosen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lljax.models.declare import declare
from lljax.models.linear import rms_normalize
from lljax.models.spec import MoESpec
from lljax.parallel.sharding import Layout, token_parts

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}  # MoESpec.score

Load = Float[Array, "B devices 2 E"]  # see `load_of`


class Routing(NamedTuple):
    """weights, experts: of the k experts of each token. probabilities: scores of all experts,
    normalized to sum to 1 for each token.
    """

    weights: Float[Array, "M k"]
    experts: Int[Array, "M k"]
    probabilities: Float[Array, "M E"]


class Router(nnx.Module):
    """Scores of the experts for each token, and the k best; Shazeer et al. 2017, arXiv 1701.06538,
    and the choices of `MoESpec`.
    """

    def __init__(self, D: int, moe: MoESpec, *, hf: str, eps: float):
        """hf: the prefix of the block with the experts. eps: of the norm of a scaled input."""
        router, axes = f"{hf}.{moe.router}", moe.correction_axes
        self.weight = declare(
            (D, moe.E), axes=("embed", None), hf=f"{router}.weight", role="router", transpose=True
        )
        self.bias = (
            declare((moe.E,), axes=(None,), hf=f"{router}.bias", role="router", init="zeros")
            if moe.bias
            else None
        )
        self.correction = (
            declare(
                (*(1,) * (axes - 1), moe.E),
                axes=(None,) * axes,
                hf=f"{hf}.{moe.correction_name}",
                role="router",
                init="zeros",
            )
            if moe.correction
            else None
        )
        of_input, of_expert = moe.router_scales or (None, None)
        self.input_scale = _scale(D, hf, of_input)
        self.expert_scale = _scale(moe.E, hf, of_expert)
        self.moe, self.eps = moe, eps

    def __call__(self, x: Float[Array, "M D"]) -> Routing:
        """float32 throughout: the low bits of a logit decide which expert is taken."""
        moe, score = self.moe, SCORES[self.moe.score]
        x = x.astype(jnp.float32)
        if self.input_scale is not None:
            scale = self.input_scale[...].astype(jnp.float32) * x.shape[-1] ** -0.5
            x = rms_normalize(x, self.eps) * scale
        logits = jnp.matmul(x, self.weight[...].astype(jnp.float32), precision="highest")
        if self.bias is not None:
            logits += self.bias[...]
        scores = logits if moe.best_first else score(logits)
        experts = self._best(scores)
        weights = jnp.take_along_axis(scores, experts, axis=1)
        if moe.best_first:
            weights = score(weights)
        if moe.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[...][experts]
        probabilities = score(logits) if moe.best_first else scores
        if moe.score == "sigmoid":
            probabilities = probabilities / (probabilities.sum(-1, keepdims=True) + 1e-20)
        return Routing(weights * moe.scale, experts, probabilities)

    def _best(self, scores: Float[Array, "M E"]) -> Int[Array, "M k"]:
        """The best k experts of each token, from its best groups only if there are groups."""
        moe = self.moe
        ranks = scores if self.correction is None else scores + self.correction[...]
        if moe.best_groups < moe.groups:
            grouped = ranks.reshape(-1, moe.groups, moe.E // moe.groups)
            of_groups = jax.lax.top_k(grouped, 2)[0].sum(-1)
            best = jax.nn.one_hot(
                jax.lax.top_k(of_groups, moe.best_groups)[1], moe.groups, dtype=bool
            ).any(1)
            ranks = jnp.where(best[..., None], grouped, -jnp.inf).reshape(ranks.shape)
        return jax.lax.top_k(jax.lax.stop_gradient(ranks), moe.k)[1]


def _scale(size: int, hf: str, name: str | None) -> Any:
    if name is None:
        return None
    return declare((size,), axes=(None,), hf=f"{hf}.{name}", role="router", init="ones")


def load_of(routing: Routing, counted: Bool[Array, "B T"] | None) -> Load | None:
    """How many of the counted tokens of a row chose each expert, and the sum of its probabilities;
    None if nothing is counted.

    On a mesh the second axis has an entry for each device that holds a part of the row, so that
    counting needs no communication.
    """
    if counted is None:
        return None
    E, k = routing.probabilities.shape[1], routing.experts.shape[1]
    chosen = sum(
        (routing.experts[:, j, None] == jnp.arange(E)).astype(jnp.float32) for j in range(k)
    )

    def total(x):
        return jnp.sum(jnp.where(counted[..., None], x.reshape(*counted.shape, E), 0), axis=1)

    return jnp.stack([total(chosen), total(routing.probabilities)], axis=1)[:, None]


def no_load(moe: MoESpec, counted: Bool[Array, "B T"], layout: Layout | None) -> Load:
    """The load of no token, to add to."""
    return jnp.zeros((counted.shape[0], token_parts(layout), 2, moe.E), jnp.float32)
