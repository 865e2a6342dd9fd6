"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): keys and values of
all heads are made of one narrow latent a token. Formulas follow transformers
`models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import jax.numpy as jnp

from lljax.models.linear import Linear, RMSNorm
from lljax.models.mixers.attention import Attention, halves
from lljax.models.spec import DecoderSpec

EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is


class MLA(Attention):
    """Of a query and a key the first `rope` dimensions are turned, so that RoPE is that of every
    other family; a checkpoint has them last. Values are shorter than queries and keys, and no
    attention kernel takes that: they are filled up with zeros, which changes nothing and which
    `join` cuts off again.
    """

    def __init__(self, spec: DecoderSpec, hf: str):
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
        self.unit_eps, self.interleaved, self.sinks = None, spec.interleaved, None
        self.H, self.scale, self.softcap, self.mla = H, spec.scale, spec.attention_softcap, mla

    def heads(self, x, dropout_key=None):
        """Queries, keys and values [B, T, N, H] of x [B, T, D], before rotation."""
        B, T, _ = x.shape
        if self.mla.q_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, dropout_key)), dropout_key)
        else:
            q = self.q_proj(x, dropout_key)
        q = q.reshape(B, T, -1, self.H)
        q = jnp.concatenate(
            [self._turning(q[..., -self.mla.rope :]), q[..., : -self.mla.rope]], axis=-1
        )
        latent = self.kv_a_proj_with_mqa(x, dropout_key)
        latent, shared = latent[..., : self.mla.kv_rank], latent[..., None, self.mla.kv_rank :]
        kv = self.kv_b_proj(self.kv_a_layernorm(latent), dropout_key).reshape(B, T, q.shape[2], -1)
        k, v = kv[..., : -self.mla.v], kv[..., -self.mla.v :]
        shared = jnp.broadcast_to(self._turning(shared), (*k.shape[:3], self.mla.rope))
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, self.H - self.mla.v)))
        return q, jnp.concatenate([shared, k], axis=-1), v

    def join(self, out):
        return super().join(out[..., : self.mla.v])

    def _turning(self, x):
        return halves(x) if self.interleaved else x
