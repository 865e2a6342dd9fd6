"""Text from a model, one token at a time over a key/value cache."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.models.decoder import empty_cache

CHUNK = 512                                  # prompt tokens read at a time: bounds the memory of a long prompt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_p keeps the smallest set of tokens with that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(model: nnx.Module, prompt: np.ndarray, *, tokens: int, sampling: Sampling = Sampling(),
             stop: frozenset[int] = frozenset(), dtype=jnp.float32) -> Iterator[int]:
    """Yields up to `tokens` tokens that continue `prompt` (int [n]), ending before one of `stop`.

    Attention is full whatever the model was trained under. The RoPE kinds that look at the length are given that of
    prompt and continuation together, so that keys in the cache stay true.
    """
    n, total = len(prompt), len(prompt) + tokens
    slots = -(-total // CHUNK) * CHUNK       # one compilation for prompts of similar length
    graphdef, state = nnx.split(model)
    cache = empty_cache(model.spec, 1, slots, dtype)
    for start in range(0, n, CHUNK):
        piece = np.zeros(CHUNK, np.int32)
        piece[:n - start] = prompt[start:start + CHUNK]
        logits, cache = _read(graphdef, state, jnp.asarray(piece)[None], cache, total, min(n - start, CHUNK), dtype)
    key = jax.random.key(sampling.seed)
    for i in range(tokens):
        token = int(_choose(logits, jax.random.fold_in(key, i), sampling))
        if token in stop:
            return
        yield token
        if i + 1 < tokens:
            logits, cache = _read(graphdef, state, jnp.full((1, 1), token, jnp.int32), cache, total, 1, dtype)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _read(graphdef, state, tokens, cache, rope_length, real, dtype):
    """Reads tokens [1, C], of which the first `real` count, into the cache; returns the logits [V] after the last one."""
    model = nnx.merge(graphdef, state)
    positions = cache.used + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, new = model(tokens, positions=positions, cache=cache, dtype=dtype, rope_length=rope_length)
    # The padding of the last chunk is written too, and overwritten by what follows.
    return model.logits(hidden[0, real - 1]), dataclasses.replace(new, used=cache.used + real)


@functools.partial(jax.jit, static_argnums=2)
def _choose(logits, key, sampling: Sampling):
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    logits = logits / sampling.temperature
    order = jnp.argsort(-logits)
    probability = jax.nn.softmax(logits[order])
    kept = jnp.cumsum(probability) - probability < sampling.top_p
    return order[jax.random.categorical(key, jnp.where(kept, logits[order], -jnp.inf))]
