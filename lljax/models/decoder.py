"""The decoder: embed, scan over the stacked layers, norm. One file for every family; the spec says what differs."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention import Mask
from lljax.attention.softcap import capped
from lljax.models import rope
from lljax.models.declare import declare, stack
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.layers import AttentionPattern, RMSNorm
from lljax.models.memory import EVERYTHING, Memory, groups_layers, scan_layers
from lljax.models.probe import rows
from lljax.models.quantize import dense, dequantised
from lljax.models.spec import DecoderSpec, LayerSpec
from lljax.sharding import Layout, constrain_activations, gathered

FULL = AttentionPattern()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far.

    kv: for each stack of layers k and v, [layers of it, B, S, K, H]. segments: int32 [B, S], 0 for padding. used: tokens
    read so far, int32.
    """

    kv: tuple[tuple[jax.Array, jax.Array], ...]
    segments: jax.Array
    used: jax.Array


def empty_cache(spec: DecoderSpec, B: int, S: int, dtype=jnp.float32) -> Cache:
    stacks = [times for _, places, times in repeats(spec.layers) for _ in places]
    kv = tuple(tuple(jnp.zeros((times, B, S, spec.K, spec.H), dtype) for _ in "kv") for times in stacks)
    return Cache(kv, jnp.zeros((B, S), jnp.int32), jnp.int32(0))


class Decoder(nnx.Module):
    """A causal language model, abstract until initialised (lljax.models.initialise) or loaded (lljax.interop)."""

    def __init__(self, spec: DecoderSpec):
        self.spec = spec
        self.embed = declare((spec.V, spec.D), axes=("vocab", "embed"), hf="model.embed_tokens.weight", role="embed")
        # Layers that take turns are a stack each, in the order of `repeats`.
        self.layers = nnx.List([stack(DecoderLayer(spec, layer), times, first + place, len(places))
                                for first, places, times in repeats(spec.layers) for place, layer in enumerate(places)])
        self.norm = RMSNorm(spec.D, spec.norm_eps, hf="model.norm", plus_one=spec.norm_plus_one)
        self.lm_head = None if spec.tied else declare((spec.V, spec.D), axes=("vocab", "embed"),
                                                      hf="lm_head.weight", role="head")

    @property
    def head(self):
        """The output matrix [V, D], an array or lljax.models.probe.Probed; the embedding itself where the two are tied."""
        return dense((self.embed if self.lm_head is None else self.lm_head).get_value())

    def __call__(self, tokens, *, positions, segments=None, index=None, pattern: AttentionPattern = FULL,
                 layout: Layout | None = None, memory: Memory = EVERYTHING, dtype=None, dropout_key=None,
                 cache: Cache | None = None, rope_length=None):
        """The hidden states [B, T, D] that `head` turns into logits.

        tokens, positions: int32 [B, T]; positions restart in each document of a packed row.
        segments: int32 [B, T] document of each token, 0 for padding; None for one document a row.
        index: int32 [B, T] place of each token in its row; None for 0, 1, 2 ... Tokens may come in any order.
        layout: how all of these lie on a mesh; None for one device.
        memory: what the backward pass keeps.
        dtype: of the residual and of the compute; None for that of the weights.
        rope_length: positions in use, where a RoPE kind depends on it; None for the largest of `positions` + 1.
        With a `cache` the tokens continue what it holds, and (hidden, cache) is returned.
        """
        dtype = dtype or self.layers[0].self_attn.o_proj.kernel.get_value().dtype
        x = rows(dense(self.embed.get_value()), tokens, dtype=dtype, layout=layout)
        if self.spec.embed_scale != 1:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        length = jnp.max(positions) + 1 if rope_length is None else rope_length
        rotations = tuple(rope.rotation(positions, rope.frequencies(each, self.spec.rotary, length))
                          for each in self.spec.ropes)
        if cache is None:
            mask, start, kv = self._mask(tokens, positions, segments, index, pattern), 0, (None,) * len(self.layers)
        else:
            start, kv = cache.used, cache.kv
            cache, mask = _extend(cache, tokens.shape, segments)

        def layer_of(graphdef):
            def layer(x, xs):
                weights, key, kv = xs
                weights = dequantised(gathered(weights, layout), x.dtype)
                x, kv = nnx.merge(graphdef, weights)(x, rotations, mask, pattern, layout, memory, kv, start, key)
                return constrain_activations(x, layout), kv
            return layer

        keys, out = None if dropout_key is None else jax.random.split(dropout_key, self.spec.L), []
        for first, places, times in repeats(self.spec.layers):
            layers, xs = [], []
            for place in range(len(places)):
                graphdef, weights = nnx.split(self.layers[len(out) + place])
                mine = slice(first + place, first + times * len(places), len(places))
                layers.append(layer_of(graphdef))
                xs.append((weights, None if keys is None else keys[mine], kv[len(out) + place]))
            x, kv_out = scan_layers(layers, x, tuple(xs), memory, layout)
            out.extend(kv_out)
        x = self.norm(x)
        return x if cache is None else (x, dataclasses.replace(cache, kv=tuple(out)))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] of hidden [..., D]."""
        logits = jnp.einsum("...D,VD->...V", hidden, self.head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return capped(logits, self.spec.logit_softcap)

    def _mask(self, tokens, positions, segments, index, pattern: AttentionPattern) -> Mask:
        ordered = index is None
        if ordered:
            index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        anchors = None
        if pattern.kind == "window" and (pattern.anchors or pattern.markers):
            anchors = (positions < pattern.anchors) | jnp.isin(tokens, jnp.asarray(pattern.markers, tokens.dtype))
        return Mask(index, index, segments, segments, anchors, ordered=ordered)


def share_residuals(layers: tuple[LayerSpec, ...], each: int) -> bool:
    """Whether one residual per `each` layers can be kept: see `repeats`."""
    return all(groups_layers(each, len(places), times) for _, places, times in repeats(layers))


def _extend(cache: Cache, shape: tuple[int, int], segments):
    """The cache with `shape` = (B, T) more tokens counted in, and the mask of those tokens over it."""
    B, T = shape
    index = jnp.broadcast_to(jnp.arange(cache.segments.shape[1], dtype=jnp.int32), cache.segments.shape)
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    k_segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.used, axis=1)
    q_index = jax.lax.dynamic_slice_in_dim(index, cache.used, T, axis=1)
    # Slots beyond the new tokens hold no key yet; causality alone hides them.
    return (dataclasses.replace(cache, segments=k_segments, used=cache.used + T),
            Mask(q_index, index, segments, k_segments))


def repeats(layers: tuple[LayerSpec, ...]) -> list[tuple[int, tuple[LayerSpec, ...], int]]:
    """The layers as patterns that repeat: (first layer, pattern, times), one after the other. The longest stretch first, of
    the shortest pattern that makes it; nearly every model is one pattern of one layer."""
    found, first = [], 0
    while first < len(layers):
        best = (1, 1)                        # layers of the pattern, times
        for period in range(1, (len(layers) - first) // 2 + 1):
            pattern, times = layers[first:first + period], 1
            while layers[first + times * period:first + (times + 1) * period] == pattern:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = period, times
        period, times = best
        found.append((first, layers[first:first + period], times))
        first += period * times
    return found
