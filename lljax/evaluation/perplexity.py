"""Perplexity of held-out documents at several lengths, by protocol."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.data.packing import IGNORED
from lljax.data.tokens import TokenStore
from lljax.errors import DataError
from lljax.evaluation.protocols import STRIDE
from lljax.evaluation.task import TooShort
from lljax.objectives.token_loss import loss_of
from lljax.parallel.sharding import Layout, row_parts

CHUNK = 1024  # tokens whose logits exist at one time


def read(protocol: str, store: TokenStore, length: int, longest: int, limit: int) -> np.ndarray:
    """What a protocol reads of held-out documents at `length`, the longest being `longest`: int32
    [n, tokens], n <= `limit`.

    Raises:
      DataError: there are none, or they are too short. TooShort: the length is.
    """
    if not len(store.lengths):
        raise DataError(
            f"{protocol}: no document is held out: name JSONL files with --held_out (or, for a run to come, with "
            "data.valid, or a share of its documents with data.valid_fraction)"
        )
    if protocol == "perplexity":
        found = windows(store, longest, limit)
    elif protocol == "perplexity/longlora":
        found = longlora_windows(store.stream, length, limit)
    else:
        found = new_token_windows(store.stream, length, longest, limit)
    if not len(found):
        what = (
            f"document has more than {longest} tokens"
            if protocol == "perplexity"
            else f"window of {longest} tokens is in the {len(store.stream)} of the held-out documents"
        )
        raise DataError(
            f"{protocol}: no held-out {what}: shorten --lengths, or hold more out (data.valid_fraction, "
            "--held_out)"
        )
    return found


def measure(
    protocol: str, model: nnx.Module, texts: Iterable[np.ndarray], length: int, **how
) -> float:
    """The perplexity of what `read` gave for `length`. Attention is full. how: dtype, layout (None
    for one device).
    """
    if protocol == "perplexity":
        return perplexity(model, texts, length, **how)
    return window_perplexity(
        model, texts, length - 1 if protocol == "perplexity/longlora" else STRIDE, **how
    )


def predicted(protocol: str, pieces: np.ndarray) -> np.ndarray | None:
    """What `read` gave, as far as a protocol predicts it at every length of one command; None where
    each length has texts of its own.
    """
    return {"perplexity": pieces, "perplexity/new_tokens": pieces[:, -STRIDE:]}.get(protocol)


def windows(store: TokenStore, longest: int, limit: int) -> np.ndarray:
    """The first `longest` + 1 tokens of up to `limit` documents that have them, int32 [documents,
    longest + 1].
    """
    chosen = [i for i, n in enumerate(store.lengths) if n > longest][:limit]
    return (
        np.stack([store.tokens(i)[: longest + 1] for i in chosen]).astype(np.int32)
        if chosen
        else np.zeros((0, longest + 1), np.int32)
    )


def longlora_windows(
    stream: np.ndarray, length: int, limit: int, stride: int = STRIDE
) -> np.ndarray:
    """LongLoRA's windows of a stream of tokens, without the last as there, int32 [n, length];
    `limit` of them, spread.
    """
    return _cut(stream, range(0, len(stream) - length, stride)[:-1], length, limit)


def new_token_windows(
    stream: np.ndarray, length: int, longest: int, limit: int, stride: int = STRIDE
) -> np.ndarray:
    """Windows that end where those of `longest` tokens do, int32 [n, length]."""
    if length <= stride:
        raise TooShort(
            f"perplexity/new_tokens: the last {stride} tokens of {length} have nothing before them: ask for longer "
            "ones with --lengths"
        )
    return _cut(stream, range(longest - length, len(stream) - length + 1, stride), length, limit)


def _cut(stream, starts: range, length: int, limit: int) -> np.ndarray:
    chosen = np.linspace(0, len(starts) - 1, min(limit, len(starts))).astype(int)
    return np.array([stream[starts[i] : starts[i] + length] for i in chosen], np.int32).reshape(
        -1, length
    )


def perplexity(
    model: nnx.Module,
    texts: Iterable[np.ndarray],
    length: int,
    *,
    dtype=jnp.float32,
    layout: Layout | None = None,
) -> float:
    """Perplexity of `texts` [documents, longest + 1] read in consecutive windows of `length`
    tokens.

    Every length predicts the same tokens, from at most `length` of context: what changes with the
    length is what the model can see. Attention is full.
    """
    graphdef, state = nnx.split(model)
    total, count = 0.0, 0
    for text in texts:
        usable = (len(text) - 1) // length * length
        inputs, targets = (x.reshape(-1, length) for x in (text[:usable], text[1 : usable + 1]))
        total += _summed(graphdef, state, inputs, targets, dtype, layout)
        count += targets.size
    return _exp(total / count) if count else math.nan


def window_perplexity(
    model: nnx.Module,
    texts: Iterable[np.ndarray],
    counted: int,
    *,
    dtype=jnp.float32,
    layout: Layout | None = None,
) -> float:
    """Perplexity of the last `counted` tokens of each of `texts` [length], each given those before
    it.
    """
    graphdef, state = nnx.split(model)
    losses = []
    for text in texts:
        targets = np.append(text[1:], np.int32(IGNORED))
        targets[: len(text) - 1 - counted] = IGNORED
        losses.append(_summed(graphdef, state, text[None], targets[None], dtype, layout))
    return _exp(sum(losses) / (len(losses) * counted))


def _exp(loss: float) -> float:
    """Infinite where a float64 has no room for it."""
    return math.exp(loss) if loss < 709 else math.inf * loss


def _summed(graphdef, state, inputs, targets, dtype, layout) -> float:
    # rows that make up the number that the mesh divides
    more = -len(inputs) % row_parts(layout.mesh) if layout else 0
    inputs, targets = (
        np.pad(x, ((0, more), (0, 0)), constant_values=fill)
        for x, fill in ((inputs, 0), (targets, IGNORED))
    )
    return float(_loss(graphdef, state, inputs, targets, dtype, layout))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _loss(graphdef, state, inputs, targets, dtype, layout):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    hidden = model(inputs, positions=positions, dtype=dtype, layout=layout)
    return loss_of(model, hidden, targets, chunk=CHUNK)
