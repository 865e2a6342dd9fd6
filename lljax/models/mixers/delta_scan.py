"""The tokens of one device through a gated delta network: convolution, normalization, recurrence.

transformers `models/qwen3_5/modeling_qwen3_5.py`, Qwen3_5GatedDeltaNet.forward. Letters as in
lljax.models.mixers.delta_rule.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lljax.models.mixers import delta_rule, delta_tpu
from lljax.models.mixers.causal_conv import branched_conv, causal_conv, empty_tail, tail_after
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs

EPS = 1e-6  # of the normalization of queries and keys, whatever rms_norm_eps is


class Channels(NamedTuple):
    """Queries and keys [B, T, M, k] and values [B, T, M, R, v] before the convolution; or the
    `ConvTail` of each; or the weights of the convolution, [M, k, taps] and [M, R, v, taps].
    """

    q: Any
    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected:
    """What the tokens are projected to. decay, beta: float32, ready for the recurrence."""

    channels: Channels
    decay: Float[Array, "B T M R"]
    beta: Float[Array, "B T M R"]

    def without(self, tokens: Bool[Array, "B T"]) -> "Projected":
        """The same if these tokens leave the state as it is."""
        kept = ~tokens[..., None, None]
        decay, beta = (jnp.where(kept, a, 0.0) for a in (self.decay, self.beta))
        return dataclasses.replace(self, decay=decay, beta=beta)


class Carry(NamedTuple):
    """What tokens leave to those after them."""

    tails: Channels  # of ConvTail
    delta: DeltaCarry


def empty_carry(x: Projected, segments: Int[Array, "B T"], taps: int) -> Carry:
    """The carry before the first token of rows."""
    B, _, M, R, v = x.channels.v.shape
    tails = Channels(*(empty_tail(a, segments, taps) for a in x.channels))
    state = jnp.zeros((B, M, R, x.channels.k.shape[-1], v), jnp.float32)
    return Carry(tails, DeltaCarry(state, segments[:, 0]))


def inputs(
    x: Projected,
    weights: Channels,
    segments: Int[Array, "B T"],
    tails: Channels,
    trunks: Int[Array, "B T"] | None = None,
) -> DeltaInputs:
    """What the tokens bring to the recurrence. trunks: of whole rows with branches."""
    dtype = x.channels.q.dtype
    q, k, v = (
        jax.nn.silu(
            causal_conv(a, w, segments, tail)
            if trunks is None
            else branched_conv(a, w, segments, trunks)
        )
        for a, w, tail in zip(x.channels, weights, tails, strict=True)
    )
    q = l2_normalize(q) * q.shape[-1] ** -0.5
    q, k, v = (a.astype(dtype) for a in (q, l2_normalize(k), v))
    return DeltaInputs(q, k, v, x.decay, x.beta, segments, trunks)


def tails_after(
    x: Projected, segments: Int[Array, "B T"], tails: Channels, count: jax.Array | None = None
) -> Channels:
    """The tails after these tokens, or after the first `count` of each row."""
    return Channels(
        *(tail_after(t, a, segments, count) for t, a in zip(tails, x.channels, strict=True))
    )


def run(
    x: Projected,
    weights: Channels,
    segments: Int[Array, "B T"],
    carry: Carry,
    trunks: Int[Array, "B T"] | None = None,
    count: Int[Array, " B"] | None = None,
    *,
    platform: str,
) -> tuple[Float[Array, "B T M R v"], Carry]:
    """The outputs of tokens, float32, and the carry after them; with branches, of whole rows.

    count: the tokens of each row after which the tails are; None for all.
    platform: cpu | gpu | tpu, to choose a kernel for.
    """
    ins = inputs(x, weights, segments, carry.tails, trunks)
    out, delta = rule_for(ins, platform)(ins, carry.delta)
    return out, Carry(tails_after(x, segments, carry.tails, count), delta)


def rule_for(ins: DeltaInputs, platform: str) -> Callable:
    """The gated delta rule in the form that serves these inputs best."""
    if ins.q.shape[1] == 1:
        return delta_rule.step
    served = platform == "tpu" and delta_tpu.serves(ins)
    return delta_tpu.delta_rule if served else delta_rule.delta_rule


def l2_normalize(x: Float[Array, "... k"]) -> Float[Array, "... k"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)
