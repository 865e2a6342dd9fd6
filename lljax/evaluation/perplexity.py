"""Perplexity of held-out documents at several lengths."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.data.tokens import TokenStore
from lljax.training.loss import cross_entropy


def windows(store: TokenStore, longest: int, limit: int) -> np.ndarray:
    """The first `longest` + 1 tokens of up to `limit` documents that have them, int32 [documents, longest + 1]."""
    chosen = [i for i, n in enumerate(store.lengths) if n > longest][:limit]
    return np.stack([store.tokens(i)[:longest + 1] for i in chosen]).astype(np.int32) if chosen else \
        np.zeros((0, longest + 1), np.int32)


def perplexity(model: nnx.Module, texts: np.ndarray, length: int, *, dtype=jnp.float32, chunk: int = 1024) -> float:
    """Perplexity of `texts` [documents, longest + 1] read in consecutive windows of `length` tokens.

    Every length predicts the same tokens, from at most `length` of context: what changes with the length is what the
    model can see. Attention is full.
    """
    graphdef, state = nnx.split(model)
    total, count = 0.0, 0
    for text in texts:
        usable = (len(text) - 1) // length * length
        inputs, targets = (x.reshape(-1, length) for x in (text[:usable], text[1:usable + 1]))
        total += float(_loss(graphdef, state, inputs, targets, dtype, chunk))
        count += targets.size
    return math.exp(total / count) if count else math.nan


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _loss(graphdef, state, inputs, targets, dtype, chunk):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    hidden = model(inputs, positions=positions, dtype=dtype)
    return cross_entropy(hidden, model.head, targets, chunk=chunk, softcap=model.spec.logit_softcap,
                         update=model.head_update(hidden))
