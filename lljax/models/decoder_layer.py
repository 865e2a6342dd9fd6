"""A decoder layer: attention, then an MLP or experts, each after a norm and beside the residual."""

import functools

import jax.numpy as jnp
from flax import nnx

from lljax.attention import attend_tile, first_halo, tile_reach
from lljax.attention.mask import NEVER
from lljax.models.linear import MLP, RMSNorm
from lljax.models.memory import EVERYTHING, cuts, folded, in_tiles, tiled
from lljax.models.mixers.attention import Attention
from lljax.models.mixers.mla import MLA
from lljax.models.moe import MoE, no_load
from lljax.models.spec import DecoderSpec, LayerSpec


class DecoderLayer(nnx.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str = "model.layers.{layer}"):
        self.layer = layer

        def norm(name):
            return RMSNorm(spec.D, spec.norm_eps, hf=f"{hf}.{name}", plus_one=spec.norm_plus_one)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = (MLA if spec.mla else Attention)(spec, f"{hf}.self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = (
            norm("pre_feedforward_layernorm") if spec.norms_after else None
        )
        self.post_feedforward_layernorm = (
            norm("post_feedforward_layernorm") if spec.norms_after else None
        )
        mlp = f"{hf}.{spec.moe.block if spec.moe else 'mlp'}"
        self.mlp = MoE(spec, mlp) if layer.moe else MLP(spec, mlp, F=spec.F)

    def __call__(
        self,
        x,
        place,
        mask,
        pattern,
        layout=None,
        memory=EVERYTHING,
        cache=None,
        start=0,
        dropout_key=None,
        counted=None,
    ):
        """x [B, T, D] after the layer, its `cache`, and the load of its experts by `counted` tokens
        (None where there are no experts, or nothing is counted). place, mask: of this layer, with
        its window or chunks.
        """
        counted = counted if self.layer.moe else None
        if cache is None and cuts(x.shape[1], memory, layout):
            reach = tile_reach(x.shape[1], mask, pattern.groups, memory.tile, layout)
            if reach is not None:
                x, load = self._streamed(
                    x, place, mask, pattern, layout, memory, reach, dropout_key, counted
                )
                return x, None, load
        q, k, v = tiled(self._before, (x, place), dropout_key, memory, layout)
        mixed, cache = self.self_attn.mix(q, k, v, mask, pattern, layout, cache, start)
        load, x = folded(
            functools.partial(self._after, layout=layout),
            self._no_load(counted, layout),
            (x, mixed, counted),
            dropout_key,
            memory,
            layout,
        )
        return x, cache, load

    def _before(self, xs, key):
        """Queries, keys and values of (x, place), RoPE applied. It computes in float32, so a tile
        at a time.
        """
        x, place = xs
        q, k, v = self.self_attn.heads(self.input_layernorm(x), key)
        return self.self_attn.placed(q, place, query=True), self.self_attn.placed(k, place), v

    def _after(self, load, xs, key, layout):
        x, mixed, counted = xs
        mixed = self.self_attn.o_proj(mixed, key)
        if self.post_feedforward_layernorm is None:
            x = x + mixed
            load, y = self._mlp(load, self.post_attention_layernorm(x), counted, key, layout)
            return load, x + y
        x = x + self.post_attention_layernorm(mixed)
        load, y = self._mlp(load, self.pre_feedforward_layernorm(x), counted, key, layout)
        return load, x + self.post_feedforward_layernorm(y)

    def _mlp(self, load, x, counted, key, layout):
        """`load` with that of x, and what MLP or experts make of x."""
        mlp = functools.partial(self.mlp, layout=layout) if self.layer.moe else self.mlp
        if counted is None:
            return load, mlp(x, key)
        y, more = mlp(x, key, counted=counted)
        return load + more, y

    def _no_load(self, counted, layout):
        return None if counted is None else no_load(self.mlp.moe, counted, layout)

    def _streamed(self, x, place, mask, pattern, layout, memory, reach, key, counted):
        """The whole layer a tile at a time, each over its own keys and those of the `reach` tokens
        before it: of a row, nothing but the layer's input and output exists at one time.
        """

        def tile(carry, xs, key):
            (halo, load), (x, place, mask, real, counted) = carry, xs
            q, k, v = self._before((x, place), key)
            mask = mask.replace(
                q_index=jnp.where(real, mask.q_index, -1),
                k_index=jnp.where(real, mask.k_index, NEVER),
            )
            options = self.self_attn.options(pattern)
            mixed, halo = attend_tile(
                q, k, v, mask, halo, options, groups=pattern.groups, layout=layout
            )
            load, x = self._after(load, (x, self.self_attn.join(mixed), counted), key, layout)
            return (halo, load), x

        def keys(x, place):
            return self._before((x, place), key)[1:]

        halo = first_halo(keys, (x, place), mask, reach, layout)
        real = jnp.ones(x.shape[:2], bool)
        (_, load), x = in_tiles(
            tile,
            (halo, self._no_load(counted, layout)),
            (x, place, mask, real, counted),
            key,
            memory,
            layout,
        )
        return x, load
