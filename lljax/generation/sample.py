"""Samples the next token of each row, with parameters of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lljax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely token.

    Otherwise the filters apply in this order: the `top_k` most likely tokens (0: all); the smallest
      set of them with probability `top_p`; tokens at least `min_p` times as likely as the most
      likely (Nguyen et al. 2024, arXiv 2407.01082). Tokens that are equally likely stay or go
      together.
    repetition: divides positive logits of tokens in the prompt or the output, and multiplies
      negative ones (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
    seed: the random numbers of a completion depend on it and on the number of the token alone.

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
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 and below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition", 0 < self.repetition < float("inf"), "above 0"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
        ):
            if not good:
                raise ConfigError(f"sampling: {name}={getattr(self, name)} must be {needed}")


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samplers:
    """The sampling of each row, and what it depends on. drawn: the number of tokens drawn so far.
    token: the last of them. seen: the tokens of its prompt and output.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    key: UInt32[Array, "B 2"]
    drawn: Int[Array, " B"]
    token: Int[Array, " B"]
    seen: Bool[Array, "B V"]


def samplers_of(
    sampling: Sampling, numbers: Sequence[int], prompt: Sequence[int], V: int, rows: int
) -> Samplers:
    """`rows` equal rows before the first token. numbers: folded into the random numbers."""
    key = jax.random.key(sampling.seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    seen = np.zeros((rows, V), bool)
    seen[:, np.asarray(prompt, np.int64)] = True
    fields: dict[str, Any] = {
        name: np.full(rows, getattr(sampling, name), dtype)
        for name, dtype in (
            ("temperature", np.float32),
            ("top_k", np.int32),
            ("top_p", np.float32),
            ("min_p", np.float32),
            ("repetition", np.float32),
        )
    }
    fields |= dict.fromkeys(("drawn", "token"), np.zeros(rows, np.int32))
    fields |= {"key": np.tile(jax.random.key_data(key), (rows, 1)), "seen": seen}
    return Samplers(**fields)


def sample_tokens(
    logits: Float[Array, "B V"], samplers: Samplers
) -> tuple[Int[Array, " B"], Samplers]:
    """The next token of every row, int32, and the samplers after it.

    A token is drawn by the Gumbel-max trick, with one random number for each token of the
    vocabulary, so that filters do not change the random numbers of what they keep.
    """
    repetition = samplers.repetition[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(samplers.seen, penalized, logits)
    random = samplers.temperature > 0
    token = jax.lax.cond(
        jnp.any(random),
        lambda: jnp.where(random, _drawn(logits, samplers), jnp.argmax(logits, axis=-1)),
        lambda: jnp.argmax(logits, axis=-1),
    ).astype(jnp.int32)
    seen = samplers.seen.at[jnp.arange(len(token)), token].set(True)
    return token, dataclasses.replace(samplers, drawn=samplers.drawn + 1, token=token, seen=seen)


def _drawn(logits: Float[Array, "B V"], samplers: Samplers) -> Int[Array, " B"]:
    temperature = jnp.where(samplers.temperature > 0, samplers.temperature, 1)
    logits = logits / temperature[:, None]
    filtered = (samplers.top_k > 0) | (samplers.top_p < 1) | (samplers.min_p > 0)
    least = jax.lax.cond(
        jnp.any(filtered & (samplers.temperature > 0)),
        lambda: _least_kept(logits, samplers),
        lambda: jnp.full(len(logits), -jnp.inf),
    )
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(samplers.key), samplers.drawn)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(jnp.where(logits >= least[:, None], logits + noise, -jnp.inf), axis=-1)


def _least_kept(logits: Float[Array, "B V"], samplers: Samplers) -> Float[Array, " B"]:
    """The smallest logit that the filters of each row keep."""
    V = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    top_k = jnp.where(samplers.top_k > 0, jnp.minimum(samplers.top_k, V), V)
    ranked = jnp.where(jnp.arange(V) < top_k[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < samplers.top_p[:, None]
    kept &= probability >= samplers.min_p[:, None] * probability[:, :1]
    kept = kept.at[:, 0].set(True)  # a top_p that is 0 in float32 keeps nothing
    return jnp.min(jnp.where(kept & (ranked > -jnp.inf), ranked, jnp.inf), axis=-1)
