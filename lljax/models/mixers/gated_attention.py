"""Softmax attention whose output is gated, as in Qwen3-Next and Qwen3.5; transformers
`models/qwen3_next/modeling_qwen3_next.py`, Qwen3NextAttention.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.models.context import LayerContext
from lljax.models.linear import Linear
from lljax.models.mixers.attention import Attention, Heads
from lljax.models.mixers.kv_state import KVState
from lljax.models.rope import Positions
from lljax.models.spec import DecoderSpec, LayerSpec

GatedHeads = tuple[Heads, Float[Array, "B T X"]]


class GatedAttention(Attention):
    """Attention times a sigmoid of the token. `q_proj` has the queries and the gates, head by
    head.
    """

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str):
        super().__init__(spec, layer, hf)
        self.q_proj = Linear(
            (spec.D, 2 * spec.N * self.H),
            axes=("embed", "heads"),
            hf=f"{hf}.q_proj",
            bias=spec.qkv_bias,
        )

    def project(
        self, x: Float[Array, "B T D"], positions: Positions, dropout_key: jax.Array | None = None
    ) -> GatedHeads:
        assert self.qk_norm is not None, "a layer with mixer 'gated_attention' has QKNorm()"
        B, T, _ = x.shape
        both = self.q_proj(x, dropout_key).reshape(B, T, -1, 2 * self.H)
        q, gate = jnp.split(both, 2, axis=-1)
        k = self.k_proj(x, dropout_key)
        v = self._values(x, k, dropout_key)
        q, k = self._normalized(q, k.reshape(B, T, -1, self.H))
        heads = self._rotated(q, positions), self._rotated(k, positions), v
        return heads, gate.reshape(B, T, -1)

    def mix(
        self, operands: GatedHeads, context: LayerContext, state: KVState | None = None
    ) -> tuple[Float[Array, "B T X"], KVState | None]:
        heads, gate = operands
        out, state = super().mix(heads, context, state)
        return out * jax.nn.sigmoid(gate), state

    def first_carry(
        self, project: Callable[[tuple], GatedHeads], xs: tuple, context: LayerContext
    ) -> Any | None:
        return super().first_carry(lambda xs: project(xs)[0], xs, context)

    def mix_tile(
        self, operands: GatedHeads, context: LayerContext, carry: Any
    ) -> tuple[Float[Array, "B t X"], Any]:
        heads, gate = operands
        out, carry = super().mix_tile(heads, context, carry)
        return out * jax.nn.sigmoid(gate), carry
