"""Samples the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lljax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely token.

    Otherwise the filters apply in this order: the `top_k` most likely tokens (0: all); the smallest
      set of them with probability `top_p`; tokens at least `min_p` times as likely as the most
      likely (Nguyen et al. 2024, arXiv 2407.01082).
    repetition: divides positive logits of tokens in the prompt or the output, and multiplies
      negative ones (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Raises:
      ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, good, needed in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 and below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition", self.repetition > 0, "above 0"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
        ):
            if not good:
                raise ConfigError(f"sampling: {name}={getattr(self, name)} must be {needed}")


GREEDY = Sampling()


def sample_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> Int[Array, " B"]:
    """The next token of every row, int32.

    seen: the tokens in the row's prompt and output; required for `repetition`.
    """
    if sampling.repetition != 1:
        assert seen is not None, "repetition needs the tokens that were seen"
        penalized = jnp.where(
            logits > 0, logits / sampling.repetition, logits * sampling.repetition
        )
        logits = jnp.where(seen, penalized, logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
    kept &= probability >= sampling.min_p * probability[:, :1]
    rank = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
