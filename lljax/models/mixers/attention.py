"""Softmax attention over query, key and value heads."""

import functools

import jax.numpy as jnp
from flax import nnx

from lljax.attention import AttentionOptions, Mask, attend_parallel
from lljax.attention.pattern import AttentionPattern
from lljax.models.cache import kept, read, write
from lljax.models.declare import declare
from lljax.models.linear import Linear, RMSNorm, named_or_fused, unit
from lljax.models.rope import Place, rotate
from lljax.models.spec import DecoderSpec


class Attention(nnx.Module):
    def __init__(self, spec: DecoderSpec, hf: str):
        D, N, K, H = spec.D, spec.N, spec.K, spec.H
        names = named_or_fused(
            f"{hf}.qkv_proj" if spec.fused else None, hf, q_proj=N * H, k_proj=K * H, v_proj=K * H
        )
        self.q_proj = Linear(
            (D, N * H), axes=("embed", "heads"), bias=spec.qkv_bias, **names["q_proj"]
        )
        self.k_proj = Linear(
            (D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["k_proj"]
        )
        self.v_proj = Linear(
            (D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["v_proj"]
        )
        self.o_proj = Linear(
            (N * H, D), axes=("heads", "embed"), hf=f"{hf}.o_proj", bias=spec.output_bias
        )
        norm = functools.partial(RMSNorm, H, spec.norm_eps, plus_one=spec.norm_plus_one)
        self.q_norm = norm(hf=f"{hf}.q_norm") if spec.qk_norm else None
        self.k_norm = norm(hf=f"{hf}.k_norm") if spec.qk_norm else None
        self.unit_eps, self.interleaved = spec.norm_eps if spec.qk_unit else None, spec.interleaved
        self.sinks = (
            declare((N,), axes=("heads",), hf=f"{hf}.sinks", role="bias", init="zeros")
            if spec.sinks
            else None
        )
        self.H, self.scale, self.softcap = H, spec.scale, spec.attention_softcap

    def heads(self, x, dropout_key=None):
        """Queries [B, T, N, H], keys and values [B, T, K, H] of x [B, T, D], before rotation."""
        q, k, v = (
            projection(x, dropout_key).reshape(*x.shape[:2], -1, self.H)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (halves(q), halves(k), v) if self.interleaved else (q, k, v)

    def placed(self, x, place: Place, *, query: bool = False):
        """Keys [B, T, K, H] of `heads`, or queries, with what their places do to them."""
        if query and place.temperature is not None:
            x = (x * place.temperature[:, :, None, None]).astype(x.dtype)
        if place.rotation is None:
            return x
        x = rotate(x, place.rotation)
        return x if self.unit_eps is None else unit(x, self.unit_eps).astype(x.dtype)

    def options(self, pattern: AttentionPattern) -> AttentionOptions:
        """What attention takes besides queries, keys, values and their mask."""
        # float32, like the sums that they enter
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        return AttentionOptions(
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            implementation=pattern.implementation,
        )

    def mix(self, q, k, v, mask: Mask, pattern: AttentionPattern, layout=None, cache=None, start=0):
        """Attention [B, T, N * H] of `heads`, queries and keys `placed`; with a `cache` (k, v [B,
        K, S, H]) over its entries too, the new ones from slot `start` on. Also returns what the
        cache keeps of them. `o_proj` comes after it.
        """
        if cache is not None:
            new = tuple(kept(each, held) for each, held in zip((k, v), cache))
            k, v = (read(write(held, each, start), q.dtype) for held, each in zip(cache, new))
            cache = new
        options = self.options(pattern)
        out = attend_parallel(q, k, v, mask, options, groups=pattern.groups, layout=layout)
        return self.join(out), cache

    def join(self, out):
        """What `o_proj` takes, [B, T, N * H], of the heads [B, T, N, H] that attention gives."""
        return out.reshape(*out.shape[:2], -1)


def halves(x):
    """[..., dimensions] in the order in which i pairs with the one half of them further; a
    checkpoint whose RoPE pairs neighbours has them in another. Scores do not change where queries
    and keys are ordered alike.
    """
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
