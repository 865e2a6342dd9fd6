"""A short causal convolution of each channel by itself, within documents."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTail:
    """The last inputs of a convolution, one fewer than its taps, and their documents."""

    x: Float[Array, "B taps-1 ..."]
    segments: Int[Array, "B taps-1"]


def causal_conv(
    x: Float[Array, "B T ..."],
    weight: Float[Array, "... taps"],
    segments: Int[Array, "B T"],
    tail: ConvTail,
) -> Float[Array, "B T ..."]:
    """y_t = sum over i of weight[i] x_(t - taps + 1 + i), of inputs of the same document; float32.

    As torch.nn.Conv1d with a group for each channel, padded on the left.
    """
    taps, T = weight.shape[-1], x.shape[1]
    x, before = _after(tail.x, x), _after(tail.segments, segments)
    y = jnp.zeros((), jnp.float32)
    for i in range(taps):
        same = before[:, i : i + T] == segments
        inputs = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), x[:, i : i + T], 0)
        y += inputs.astype(jnp.float32) * weight[..., i].astype(jnp.float32)
    return y


def branched_conv(
    x: Float[Array, "B T ..."],
    weight: Float[Array, "... taps"],
    segments: Int[Array, "B T"],
    trunks: Int[Array, "B T"],
) -> Float[Array, "B T ..."]:
    """`causal_conv` of whole rows with branches, whose first tokens follow the last of their
    prompt. trunks: see `lljax.models.mixers.delta_rule.DeltaInputs`.
    """
    B, T = segments.shape
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    # The last token of a prompt so far: of its own for every branch, which stand behind it.
    prompt = jax.lax.cummax(jnp.where(segments == trunks, places, -1), axis=1)
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :T]
    follows = jnp.where(segments == trunks, -1, prompt)
    parent = jnp.where(before == segments, places - 1, follows)
    y, place = jnp.zeros((), jnp.float32), places
    for i in reversed(range(weight.shape[-1])):
        at = jnp.maximum(place, 0).reshape(B, T, *(1,) * (x.ndim - 2))
        there = (place >= 0).reshape(at.shape)
        inputs = jnp.where(there, jnp.take_along_axis(x, at, axis=1), 0)
        y += inputs.astype(jnp.float32) * weight[..., i].astype(jnp.float32)
        place = jnp.where(
            place >= 0, jnp.take_along_axis(parent, jnp.maximum(place, 0), axis=1), -1
        )
    return y


def tail_after(
    tail: ConvTail,
    x: Float[Array, "B T ..."],
    segments: Int[Array, "B T"],
    count: Int[Array, " B"] | None = None,
) -> ConvTail:
    """The tail after these tokens, or after the first `count` of each row."""
    taken = tail.segments.shape[1]
    both = ConvTail(_after(tail.x, x), _after(tail.segments, segments))
    if count is None:
        return jax.tree.map(lambda a: a[:, a.shape[1] - taken :], both)
    cut = jax.vmap(lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, taken))
    return jax.tree.map(lambda a: cut(a, count), both)


def empty_tail(x: Float[Array, "B T ..."], segments: Int[Array, "B T"], taps: int) -> ConvTail:
    """The tail before the first token of rows: zeros."""
    B, _, *rest = x.shape
    before = jnp.broadcast_to(segments[:, :1], (B, taps - 1))
    return ConvTail(jnp.zeros((B, taps - 1, *rest), x.dtype), before)


def _after(before: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.concatenate([before.astype(x.dtype), x], axis=1)
