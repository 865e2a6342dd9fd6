"""The decoder: embed, scan over the stacked layers, norm. One file for every family; the spec says what differs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention import Mask
from lljax.models import rope
from lljax.models.declare import declare, stack
from lljax.models.layers import AttentionPattern, DecoderLayer, RMSNorm
from lljax.models.memory import EVERYTHING, Memory, scan_layers
from lljax.models.quantize import dequantised
from lljax.models.spec import DecoderSpec
from lljax.sharding import Layout, constrain_activations, gathered

FULL = AttentionPattern()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far.

    k, v: [L, B, S, K, H]. segments: int32 [B, S], 0 for padding. used: tokens read so far, int32.
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    used: jax.Array


def empty_cache(spec: DecoderSpec, B: int, S: int, dtype=jnp.float32) -> Cache:
    shape = (spec.L, B, S, spec.K, spec.H)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((B, S), jnp.int32), jnp.int32(0))


class Decoder(nnx.Module):
    """A causal language model, abstract until initialised (lljax.models.initialise) or loaded (lljax.interop)."""

    def __init__(self, spec: DecoderSpec):
        self.spec = spec
        self.embed = declare((spec.V, spec.D), axes=("vocab", "embed"), hf="model.embed_tokens.weight", role="embed")
        self.layers = stack(DecoderLayer(spec), spec.L)
        self.norm = RMSNorm(spec.D, spec.norm_eps, hf="model.norm")
        self.lm_head = None if spec.tied else declare((spec.V, spec.D), axes=("vocab", "embed"),
                                                      hf="lm_head.weight", role="head")

    @property
    def head(self) -> jax.Array:
        """The output matrix [V, D]; the embedding itself where the two are tied."""
        return (self.embed if self.lm_head is None else self.lm_head)[...]

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
        x = jnp.take(gathered(self.embed, layout, stacked=False).get_value(), tokens, axis=0)
        x = x.astype(dtype or self.layers.self_attn.q_proj.kernel.get_value().dtype)
        x = constrain_activations(x, layout)
        frequencies = rope.frequencies(self.spec.rope, self.spec.H,
                                       jnp.max(positions) + 1 if rope_length is None else rope_length)
        rotation = rope.rotation(positions, frequencies)
        if cache is None:
            mask, start, kv = self._mask(tokens, positions, segments, index, pattern), 0, None
        else:
            start, kv = cache.used, (cache.k, cache.v)
            cache, mask = _extend(cache, tokens.shape, segments)

        graphdef, weights = nnx.split(self.layers)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.spec.L)
        out = []
        for layers, window in runs(self.spec.windows):
            mask_here = mask.replace(window=_narrower(window, pattern.window if pattern.kind == "window" else None))

            def layer(x, xs, mask=mask_here):
                weights, key, kv = xs
                weights = dequantised(gathered(weights, layout, stacked=True), x.dtype)
                x, kv = nnx.merge(graphdef, weights)(x, rotation, mask, pattern, layout, memory, kv, start, key)
                return constrain_activations(x, layout), kv

            whole = layers == slice(0, self.spec.L)
            xs = (weights, keys, kv) if whole else jax.tree.map(lambda a: a[layers], (weights, keys, kv))
            x, kv_out = scan_layers(layer, x, xs, memory, layout)
            out.append(kv_out)
        x = self.norm(x)
        if cache is None:
            return x
        k, v = jax.tree.map(lambda *parts: jnp.concatenate(parts), *out) if len(out) > 1 else out[0]
        return x, dataclasses.replace(cache, k=k, v=v)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] of hidden [..., D]."""
        return jnp.einsum("...D,VD->...V", hidden, self.head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def _mask(self, tokens, positions, segments, index, pattern: AttentionPattern) -> Mask:
        ordered = index is None
        if ordered:
            index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        anchors = None
        if pattern.kind == "window" and (pattern.anchors or pattern.markers):
            anchors = (positions < pattern.anchors) | jnp.isin(tokens, jnp.asarray(pattern.markers, tokens.dtype))
        return Mask(index, index, segments, segments, anchors, ordered=ordered)


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


def runs(windows):
    """Consecutive layers of one window: (slice of layers, window). Nearly every model is a single run."""
    start = 0
    for window, run in itertools.groupby(windows):
        stop = start + len(list(run))
        yield slice(start, stop), window
        start = stop


def _narrower(a: int | None, b: int | None) -> int | None:
    return min((w for w in (a, b) if w is not None), default=None)
