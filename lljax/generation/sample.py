"""Which token comes next."""

import dataclasses

import jax
import jax.numpy as jnp

from lljax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token. Of the others are kept: the `top_k` likeliest (0:
    all); of these the smallest set with probability `top_p` among them; those at least `min_p`
    times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    repetition: logits of tokens that were read or written are divided by it where positive,
      multiplied where negative (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Raises:
      ConfigError: a value outside its range.
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


def choose(
    logits: jax.Array, keys: jax.Array, seen: jax.Array | None, sampling: Sampling
) -> jax.Array:
    """int32 [B] of logits [B, V]. keys [B]: of each row. seen: bool [B, V], tokens of the row;
    needed for `repetition`.
    """
    if sampling.repetition != 1:
        logits = jnp.where(
            seen,
            jnp.where(logits > 0, logits / sampling.repetition, logits * sampling.repetition),
            logits,
        )
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
    kept &= probability >= sampling.min_p * probability[:, :1]
    at = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, at[:, None], axis=-1)[:, 0].astype(jnp.int32)
