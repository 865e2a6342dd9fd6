"""How likely a model finds given continuations."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.generation.generate import BY_LENGTH
from lljax.parallel.sharding import Layout

MULTIPLE = 128  # lengths are padded to one of it, so that few programs are compiled
CHUNK = 128  # tokens of a row whose logits exist at one time


def log_likelihoods(
    model: nnx.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 4,
    dtype=jnp.float32,
    layout: Layout | None = None,
) -> list[tuple[float, bool]]:
    """Of each (context, continuation), tokens both and the context not empty: the log-probability
    of the continuation, and whether it is what greedy decoding writes.

    rows: pairs read side by side, of like length. Attention is full. layout: of a mesh that cuts no
      rows; None for one device.
    """
    rows = 1 if model.spec.rope.type in BY_LENGTH else rows
    graphdef, state = nnx.split(model)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        most = max(len(pairs[i][1]) for i in batch)
        width, counted = _up(sum(map(len, pairs[batch[0]])) - 1, MULTIPLE), _up(most, CHUNK)
        tokens, at, targets = (
            np.zeros((rows, width), np.int32),
            *np.zeros((2, rows, counted), np.int32),
        )
        real = np.zeros((rows, counted), bool)
        for row, i in enumerate(batch):
            context, continuation = pairs[i]
            whole, n = [*context, *continuation], len(continuation)
            tokens[row, : len(whole) - 1] = whole[:-1]
            at[row, :n] = len(context) - 1 + np.arange(n)
            targets[row, :n], real[row, :n] = continuation, True
        length = sum(map(len, pairs[batch[0]])) - 1
        sums, greedy = jax.device_get(
            _score(graphdef, state, tokens, at, targets, real, length, dtype, layout)
        )
        found |= {i: (float(sums[row]), bool(greedy[row])) for row, i in enumerate(batch)}
    return [found[i] for i in range(len(pairs))]


def _up(n: int, of: int) -> int:
    return max(-(-n // of), 1) * of


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def _score(graphdef, state, tokens, at, targets, real, length, dtype, layout):
    """float32 and bool [B]. tokens [B, T]; at, targets, real [B, C]: where `targets` are predicted,
    and which of them count.
    """
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model(tokens, positions=positions, dtype=dtype, rope_length=length, layout=layout)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)

    def of_chunk(xs):
        hidden, targets = xs
        logits = model.logits(hidden)
        of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return of_target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    cut = lambda x: jnp.moveaxis(x.reshape(len(x), -1, CHUNK, *x.shape[2:]), 1, 0)
    logs, same = (
        jnp.moveaxis(x, 0, 1).reshape(real.shape)
        for x in jax.lax.map(of_chunk, (cut(hidden), cut(targets)))
    )
    return jnp.sum(jnp.where(real, logs, 0.0), axis=1), jnp.all(same | ~real, axis=1)
