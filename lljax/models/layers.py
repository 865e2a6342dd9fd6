"""The modules of a decoder layer. Each declares its parameters once; see lljax.models.declare.

Formulas follow transformers `models/llama/modeling_llama.py` and `models/qwen3/modeling_qwen3.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention import Mask, attend_parallel, attend_tile, first_halo, tile_reach
from lljax.attention.mask import NEVER
from lljax.models.declare import declare
from lljax.models.memory import EVERYTHING, cuts, in_tiles, tiled
from lljax.models.rope import rotate
from lljax.models.spec import DecoderSpec, LayerSpec


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """What a stage of the schedule adds to the model's own mask: full | shifted (groups) | window (with anchors)."""

    kind: str = "full"
    group: int = 0                           # tokens, for shifted
    window: int = 0                          # tokens, for window
    anchors: int = 0                         # first tokens of each document, for window
    markers: tuple[int, ...] = ()            # token ids that are anchors wherever they stand, for window

    @property
    def groups(self) -> int | None:
        """Tokens of a group, None where the row is not cut into groups."""
        return self.group if self.kind == "shifted" else None


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, *, hf: str, axis: str | None = None):
        self.weight = declare((size,), axes=(axis,), hf=f"{hf}.weight", role="norm", init="ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis, in float32: the mean of squares of a bfloat16 row loses its low bits."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * wide.astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias) (+ low-rank update); kernel is [in, out]. `lora` is filled by lljax.models.lora.attach."""

    def __init__(self, shape: tuple[int, int], *, axes: tuple, hf: str, bias: bool = False):
        self.kernel = declare(shape, axes=axes, hf=f"{hf}.weight", role="kernel", transpose=True)
        self.bias = declare(shape[1:], axes=axes[1:], hf=f"{hf}.bias", role="bias", init="zeros") if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if self.lora is not None:
            y += self.lora(x, dropout_key)
        return y


class Attention(nnx.Module):
    def __init__(self, spec: DecoderSpec, hf: str):
        D, N, K, H = spec.D, spec.N, spec.K, spec.H
        self.q_proj = Linear((D, N * H), axes=("embed", "heads"), hf=f"{hf}.q_proj", bias=spec.qkv_bias)
        self.k_proj = Linear((D, K * H), axes=("embed", "kv_heads"), hf=f"{hf}.k_proj", bias=spec.qkv_bias)
        self.v_proj = Linear((D, K * H), axes=("embed", "kv_heads"), hf=f"{hf}.v_proj", bias=spec.qkv_bias)
        self.o_proj = Linear((N * H, D), axes=("heads", "embed"), hf=f"{hf}.o_proj", bias=spec.output_bias)
        self.q_norm = RMSNorm(H, spec.norm_eps, hf=f"{hf}.q_norm") if spec.qk_norm else None
        self.k_norm = RMSNorm(H, spec.norm_eps, hf=f"{hf}.k_norm") if spec.qk_norm else None
        self.H = H

    def heads(self, x, dropout_key=None):
        """Queries [B, T, N, H], keys and values [B, T, K, H] of x [B, T, D], before rotation."""
        q, k, v = (projection(x, dropout_key).reshape(*x.shape[:2], -1, self.H)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def mix(self, q, k, v, rotation, mask: Mask, pattern: AttentionPattern, layout=None, cache=None, start=0):
        """Attention [B, T, N * H] of `heads`, or over `cache` (k, v [B, S, K, H]) with them written to it from `start`;
        and the cache, updated. `o_proj` comes after it."""
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                                 for old, new in zip(cache, (k, v)))
        out = attend_parallel(q, k, v, mask, scale=self.H ** -0.5, group=pattern.groups, layout=layout)
        return out.reshape(*out.shape[:2], -1), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, spec: DecoderSpec, hf: str):
        D, F, bias = spec.D, spec.F, spec.mlp_bias
        self.gate_proj = Linear((D, F), axes=("embed", "mlp"), hf=f"{hf}.gate_proj", bias=bias)
        self.up_proj = Linear((D, F), axes=("embed", "mlp"), hf=f"{hf}.up_proj", bias=bias)
        self.down_proj = Linear((F, D), axes=("mlp", "embed"), hf=f"{hf}.down_proj", bias=bias)

    def __call__(self, x: jax.Array, dropout_key=None) -> jax.Array:
        hidden = jax.nn.silu(self.gate_proj(x, dropout_key)) * self.up_proj(x, dropout_key)
        return self.down_proj(hidden, dropout_key)


class DecoderLayer(nnx.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str = "model.layers.{layer}"):
        self.layer = layer
        self.input_layernorm = RMSNorm(spec.D, spec.norm_eps, hf=f"{hf}.input_layernorm")
        self.self_attn = Attention(spec, f"{hf}.self_attn")
        self.post_attention_layernorm = RMSNorm(spec.D, spec.norm_eps, hf=f"{hf}.post_attention_layernorm")
        self.mlp = MLP(spec, f"{hf}.mlp")

    def __call__(self, x, rotations, mask, pattern, layout=None, memory=EVERYTHING, cache=None, start=0, dropout_key=None):
        """x [B, T, D] after the layer, and its `cache`. rotations: one for each of `DecoderSpec.ropes`."""
        rotation = None if self.layer.rope is None else rotations[self.layer.rope]
        mask = mask.replace(window=_narrower(self.layer.window, pattern.window or None))
        if cache is None and cuts(x.shape[1], memory, layout):
            reach = tile_reach(x.shape[1], mask, pattern.groups, memory.tile, layout)
            if reach is not None:
                return self._streamed(x, rotation, mask, pattern, layout, memory, reach, dropout_key), None
        q, k, v = tiled(self._before, x, dropout_key, memory, layout)
        mixed, cache = self.self_attn.mix(q, k, v, rotation, mask, pattern, layout, cache, start)
        return tiled(self._after, (x, mixed), dropout_key, memory, layout), cache

    def _before(self, x, key):
        return self.self_attn.heads(self.input_layernorm(x), key)

    def _after(self, xs, key):
        x, mixed = xs
        x = x + self.self_attn.o_proj(mixed, key)
        return x + self.mlp(self.post_attention_layernorm(x), key)

    def _streamed(self, x, rotation, mask, pattern, layout, memory, reach, key):
        """The whole layer a tile at a time, each over its own keys and those of the `reach` tokens before it: of a row,
        nothing but the layer's input and output exists at one time."""
        def tile(halo, xs, key):
            x, rotation, mask, real = xs
            q, k, v = self._before(x, key)
            mask = mask.replace(q_index=jnp.where(real, mask.q_index, -1), k_index=jnp.where(real, mask.k_index, NEVER))
            mixed, halo = attend_tile(rotate(q, rotation), rotate(k, rotation), v, mask, halo,
                                      scale=self.self_attn.H ** -0.5, group=pattern.groups, layout=layout)
            return halo, self._after((x, mixed.reshape(*mixed.shape[:2], -1)), key)

        def keys(x, rotation):
            _, k, v = self._before(x, key)
            return rotate(k, rotation), v
        halo = first_halo(keys, (x, rotation), mask, reach, layout)
        real = jnp.ones(x.shape[:2], bool)
        return in_tiles(tile, halo, (x, rotation, mask, real), key, memory, layout)[1]


def _narrower(a: int | None, b: int | None) -> int | None:
    return min((w for w in (a, b) if w is not None), default=None)
