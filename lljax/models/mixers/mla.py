"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): the keys and
values of all heads are projected from one narrow latent per token. Formulas follow transformers
`models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.models.linear import Linear, RMSNorm
from lljax.models.mixers.attention import Attention, Heads, deinterleave
from lljax.models.spec import DecoderSpec, LayerSpec

EPS = 1e-6  # epsilon of the norms of the latents, whatever rms_norm_eps is


class MLA(Attention):
    """RoPE rotates the first `rope` dimensions of a query or key, as in every other family; a
    checkpoint has them last. Values are shorter than keys, which no attention kernel takes: they
    are padded with zeros, which changes no result, and `_joined` cuts the padding off.
    """

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str):
        assert spec.mla is not None, "a layer with mixer 'mla' needs DecoderSpec.mla"
        D, N, H, mla = spec.D, spec.N, spec.H, spec.mla
        if mla.q_rank:
            self.q_a_proj = Linear(
                (D, mla.q_rank), axes=("embed", None), hf=f"{hf}.q_a_proj", bias=spec.qkv_bias
            )
            self.q_a_layernorm = RMSNorm(mla.q_rank, EPS, hf=f"{hf}.q_a_layernorm")
            self.q_b_proj = Linear((mla.q_rank, N * H), axes=(None, "heads"), hf=f"{hf}.q_b_proj")
        else:
            self.q_proj = Linear((D, N * H), axes=("embed", "heads"), hf=f"{hf}.q_proj")
        self.kv_a_proj_with_mqa = Linear(
            (D, mla.kv_rank + mla.rope),
            axes=("embed", None),
            hf=f"{hf}.kv_a_proj_with_mqa",
            bias=spec.qkv_bias,
        )
        self.kv_a_layernorm = RMSNorm(mla.kv_rank, EPS, hf=f"{hf}.kv_a_layernorm")
        self.kv_b_proj = Linear(
            (mla.kv_rank, N * (H - mla.rope + mla.v)), axes=(None, "heads"), hf=f"{hf}.kv_b_proj"
        )
        self.o_proj = Linear(
            (N * mla.v, D), axes=("heads", "embed"), hf=f"{hf}.o_proj", bias=spec.output_bias
        )
        self.qk_norm, self.normalize_eps, self.sinks = None, None, None
        self._set_sizes(spec, layer)
        self.mla, self.value_size = mla, mla.v

    def heads(self, x: Float[Array, "B T D"], dropout_key: jax.Array | None = None) -> Heads:
        B, T, _ = x.shape
        rope, value_size = self.mla.rope, self.mla.v
        if self.mla.q_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, dropout_key)), dropout_key)
        else:
            q = self.q_proj(x, dropout_key)
        q = q.reshape(B, T, -1, self.H)
        q = jnp.concatenate([deinterleave(q[..., -rope:], self.in_pairs), q[..., :-rope]], axis=-1)
        latent = self.kv_a_proj_with_mqa(x, dropout_key)
        latent, shared = latent[..., : self.mla.kv_rank], latent[..., None, self.mla.kv_rank :]
        kv = self.kv_b_proj(self.kv_a_layernorm(latent), dropout_key).reshape(B, T, q.shape[2], -1)
        k, v = kv[..., :-value_size], kv[..., -value_size:]
        shared = jnp.broadcast_to(deinterleave(shared, self.in_pairs), (*k.shape[:3], rope))
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, self.H - value_size)))
        return q, jnp.concatenate([shared, k], axis=-1), v

    def _joined(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T X"]:
        return super()._joined(out[..., : self.mla.v])
