"""Log-likelihoods of given continuations under a model."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lljax.models.decoder import Decoder
from lljax.models.rope import KINDS
from lljax.parallel.rounding import round_up
from lljax.parallel.sharding import Layout

MULTIPLE = 128  # pads lengths to a multiple, so that few programs are compiled
CHUNK = 128  # tokens of a row whose logits exist at one time


def log_likelihoods(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 4,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation, and whether greedy decoding would write it.

    pairs: (context, continuation) as tokens; no context is empty. rows: pairs in a batch, of
      similar length. layout: of a mesh that does not divide rows; None for one device. Attention is
      full.
    """
    rows = 1 if KINDS[model.spec.rope.type].by_length else rows
    graphdef, state = nnx.split(model)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    results: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        length = sum(map(len, pairs[batch[0]])) - 1  # of the longest
        inputs = _padded([pairs[i] for i in batch], rows, length)
        sums, greedy = jax.device_get(_score(graphdef, state, inputs, length, dtype, layout))
        results |= {i: (float(sums[row]), bool(greedy[row])) for row, i in enumerate(batch)}
    return [results[i] for i in range(len(pairs))]


class Inputs(NamedTuple):
    """A padded batch. The i-th target is predicted at `positions[i]` of `tokens` if `real[i]`."""

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B C"]
    targets: Int[np.ndarray, "B C"]
    real: Bool[np.ndarray, "B C"]


def _padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, length: int) -> Inputs:
    width = round_up(max(length, 1), MULTIPLE)
    counted = round_up(max(1, *(len(continuation) for _, continuation in pairs)), CHUNK)
    inputs = Inputs(
        tokens=np.zeros((rows, width), np.int32),
        positions=np.zeros((rows, counted), np.int32),
        targets=np.zeros((rows, counted), np.int32),
        real=np.zeros((rows, counted), bool),
    )
    for row, (context, continuation) in enumerate(pairs):
        whole, n = [*context, *continuation], len(continuation)
        inputs.tokens[row, : len(whole) - 1] = whole[:-1]
        inputs.positions[row, :n] = len(context) - 1 + np.arange(n)
        inputs.targets[row, :n], inputs.real[row, :n] = continuation, True
    return inputs


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    inputs: Inputs,
    length: int,
    dtype: Any,
    layout: Layout | None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The summed log-probability of the real targets, and whether all are greedy choices.

    length: at which RoPE is evaluated.
    """
    tokens, at, targets, real = inputs
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model(tokens, positions=positions, dtype=dtype, rope_length=length, layout=layout)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)

    def score_chunk(chunk):
        hidden, targets = chunk
        logits = model.logits(hidden)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logs = target_logits - jax.nn.logsumexp(logits, axis=-1)
        return logs, jnp.argmax(logits, axis=-1) == targets

    cut = lambda x: jnp.moveaxis(x.reshape(len(x), -1, CHUNK, *x.shape[2:]), 1, 0)
    logs, same = (
        jnp.moveaxis(x, 0, 1).reshape(real.shape)
        for x in jax.lax.map(score_chunk, (cut(hidden), cut(targets)))
    )
    return jnp.sum(jnp.where(real, logs, 0.0), axis=1), jnp.all(same | ~real, axis=1)
