"""A decoder layer: attention, then an MLP or experts, each after a norm and beside the residual."""

import functools

import jax.numpy as jnp
from flax import nnx

from lljax.attention import attend_tile, first_halo, tile_reach
from lljax.attention.mask import NEVER
from lljax.models.layers import MLP, Attention, RMSNorm
from lljax.models.memory import EVERYTHING, cuts, in_tiles, tiled
from lljax.models.mla import MLA
from lljax.models.moe import MoE
from lljax.models.spec import DecoderSpec, LayerSpec


class DecoderLayer(nnx.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str = "model.layers.{layer}"):
        self.layer = layer
        def norm(name):
            return RMSNorm(spec.D, spec.norm_eps, hf=f"{hf}.{name}", plus_one=spec.norm_plus_one)
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = (MLA if spec.mla else Attention)(spec, f"{hf}.self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm") if spec.norms_after else None
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm") if spec.norms_after else None
        mlp = f"{hf}.{spec.moe.block if spec.moe else 'mlp'}"
        self.mlp = MoE(spec, mlp) if layer.moe else MLP(spec, mlp, F=spec.F)

    def __call__(self, x, place, mask, pattern, layout=None, memory=EVERYTHING, cache=None, start=0, dropout_key=None):
        """x [B, T, D] after the layer, and its `cache`. place, mask: of this layer, with its window or chunks."""
        if cache is None and cuts(x.shape[1], memory, layout):
            reach = tile_reach(x.shape[1], mask, pattern.groups, memory.tile, layout)
            if reach is not None:
                return self._streamed(x, place, mask, pattern, layout, memory, reach, dropout_key), None
        q, k, v = tiled(self._before, x, dropout_key, memory, layout)
        mixed, cache = self.self_attn.mix(q, k, v, place, mask, pattern, layout, cache, start)
        return tiled(functools.partial(self._after, layout=layout), (x, mixed), dropout_key, memory, layout), cache

    def _before(self, x, key):
        return self.self_attn.heads(self.input_layernorm(x), key)

    def _after(self, xs, key, layout):
        x, mixed = xs
        mlp = functools.partial(self.mlp, layout=layout) if self.layer.moe else self.mlp
        mixed = self.self_attn.o_proj(mixed, key)
        if self.post_feedforward_layernorm is None:
            x = x + mixed
            return x + mlp(self.post_attention_layernorm(x), key)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(mlp(self.pre_feedforward_layernorm(x), key))

    def _streamed(self, x, place, mask, pattern, layout, memory, reach, key):
        """The whole layer a tile at a time, each over its own keys and those of the `reach` tokens before it: of a row,
        nothing but the layer's input and output exists at one time."""
        def tile(halo, xs, key):
            x, place, mask, real = xs
            q, k, v = self._before(x, key)
            mask = mask.replace(q_index=jnp.where(real, mask.q_index, -1), k_index=jnp.where(real, mask.k_index, NEVER))
            q, k = self.self_attn.placed(q, place, query=True), self.self_attn.placed(k, place)
            mixed, halo = attend_tile(q, k, v, mask, halo, group=pattern.groups, layout=layout, **self.self_attn.how)
            return halo, self._after((x, self.self_attn.join(mixed)), key, layout)

        def keys(x, place):
            _, k, v = self._before(x, key)
            return self.self_attn.placed(k, place), v
        halo = first_halo(keys, (x, place), mask, reach, layout)
        real = jnp.ones(x.shape[:2], bool)
        return in_tiles(tile, halo, (x, place, mask, real), key, memory, layout)[1]
