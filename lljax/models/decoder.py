"""The decoder: embed, scan over the stacked layers, norm. One file for every family; the spec says
what differs.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention import Mask
from lljax.attention.mask import chunked
from lljax.attention.pattern import FULL, AttentionPattern
from lljax.attention.softcap import capped
from lljax.models import rope
from lljax.models.cache import Cache, extend, write
from lljax.models.declare import declare, stack
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.linear import RMSNorm
from lljax.models.memory import EVERYTHING, Memory, groups_layers, scan_layers
from lljax.models.probe import rows
from lljax.models.quantize import dense, dequantised
from lljax.models.spec import DecoderSpec, LayerSpec, repeats
from lljax.parallel.sharded_embedding import lookup
from lljax.parallel.sharding import Layout, constrain_activations, gathered


class Decoder(nnx.Module):
    """A causal language model, abstract until initialised (lljax.models.initialise) or loaded
    (lljax.interop).
    """

    def __init__(self, spec: DecoderSpec):
        self.spec = spec
        self.embed = declare(
            (spec.V, spec.D), axes=("vocab", "embed"), hf="model.embed_tokens.weight", role="embed"
        )
        # Layers that take turns are a stack each, in the order of `repeats`.
        self.layers = nnx.List(
            [
                stack(DecoderLayer(spec, layer), times, first + place, len(places))
                for first, places, times in repeats(spec.layers)
                for place, layer in enumerate(places)
            ]
        )
        self.norm = RMSNorm(spec.D, spec.norm_eps, hf="model.norm", plus_one=spec.norm_plus_one)
        self.lm_head = (
            None
            if spec.tied
            else declare(
                (spec.V, spec.D), axes=("vocab", "embed"), hf="lm_head.weight", role="head"
            )
        )
        # filled by lljax.models.lora.attach
        self.embed_lora, self.head_lora = nnx.data(None), nnx.data(None)

    @property
    def head(self):
        """The output matrix [V, D], an array or lljax.models.probe.Probed; the embedding itself
        where the two are tied.
        """
        return dense((self.embed if self.lm_head is None else self.lm_head).get_value())

    def __call__(
        self,
        tokens,
        *,
        positions,
        segments=None,
        index=None,
        pattern: AttentionPattern = FULL,
        layout: Layout | None = None,
        memory: Memory = EVERYTHING,
        dtype=None,
        dropout_key=None,
        cache: Cache | None = None,
        rope_length=None,
        noise: float = 0.0,
        counted=None,
    ):
        """The hidden states [B, T, D] that `head` turns into logits.

        tokens, positions: int32 [B, T]; positions count from 0 in each document of a packed row.
        segments: int32 [B, T] document of each token, 0 for padding; None for one document a row.
        index: int32 [B, T] place of each token in its row; None for 0, 1, 2 ... Tokens may come in
          any order.
        layout: how all of these lie on a mesh; None for one device.
        memory: what the backward pass keeps.
        dtype: of the residual and of the compute; None for that of the weights.
        noise: alpha of the noise on the embeddings, see `noisy`; none without a dropout key.
        rope_length: positions in use, where a RoPE kind depends on it; None for the largest of
          `positions` + 1.
        counted: bool [B, T], where there are experts: tokens whose routing is counted. (hidden,
          load) is returned, load float32 [layers with experts, 2, E]: how many tokens chose each
          expert, and the sum of its probabilities (lljax.models.moe). With a `cache` the tokens
          continue what it holds, and (hidden, cache) is returned.
        """
        dtype = dtype or self.layers[0].self_attn.o_proj.kernel.get_value().dtype
        x = rows(dense(self.embed.get_value()), tokens, dtype=dtype, layout=layout)
        if self.embed_lora is not None:
            x += self.embed_lora.looked_up(
                lookup(self.embed_lora.a[...], tokens, dtype=dtype, layout=layout)
            )
        if self.spec.embed_scale != 1:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        if noise and dropout_key is not None:
            x = constrain_activations(
                noisy(x, noise, jax.random.fold_in(dropout_key, zlib.crc32(b"noise"))), layout
            )
        length = jnp.max(positions) + 1 if rope_length is None else rope_length
        rotations = tuple(
            rope.rotation(positions, rope.frequencies(each, self.spec.rotary, length))
            for each in self.spec.ropes
        )
        temperature = self.spec.temperature and rope.temperature(positions, *self.spec.temperature)
        if cache is None:
            mask, start, kv = (
                self._mask(tokens, positions, segments, index, pattern),
                0,
                (None,) * len(self.layers),
            )
        else:
            start, kv = cache.used, cache.kv
            cache, mask = extend(cache, positions, segments)
        k_positions = positions if cache is None else cache.positions

        def seen(layer: LayerSpec):
            """Its place and mask."""
            place = (
                rope.Place(None, temperature)
                if layer.rope is None
                else rope.Place(rotations[layer.rope])
            )
            window = None if layer.chunked else layer.window
            own = mask.replace(
                window=min(
                    (w for w in (window, pattern.window or None) if w is not None), default=None
                )
            )
            return place, chunked(
                own, positions, k_positions, layer.window
            ) if layer.chunked else own

        def layer_of(graphdef, spec):
            place, mask = seen(spec)

            def layer(x, xs):
                weights, key, kv = xs
                weights = dequantised(gathered(weights, layout), x.dtype)
                x, kv, load = nnx.merge(graphdef, weights)(
                    x, place, mask, pattern, layout, memory, kv, start, key, counted
                )
                return constrain_activations(x, layout), (kv, load)

            return layer

        keys, out = None if dropout_key is None else jax.random.split(dropout_key, self.spec.L), []
        for first, places, times in repeats(self.spec.layers):
            layers, xs = [], []
            for place, spec in enumerate(places):
                graphdef, weights = nnx.split(self.layers[len(out) + place])
                mine = slice(first + place, first + times * len(places), len(places))
                layers.append(layer_of(graphdef, spec))
                xs.append((weights, None if keys is None else keys[mine], kv[len(out) + place]))
            x, ys = scan_layers(layers, x, tuple(xs), memory, layout)
            out.extend(ys)
        x = self.norm(x)
        kv, loads = zip(*out)
        if counted is not None:
            return x, jnp.concatenate([load.sum((1, 2)) for load in loads if load is not None])
        if cache is None:
            return x
        # After all layers, so that this happens in place: a scan that gave whole caches back would
        # hold them twice.
        return x, dataclasses.replace(
            cache, kv=jax.tree.map(functools.partial(write, start=start), cache.kv, kv)
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] of hidden [..., D]."""
        wide = functools.partial(jnp.einsum, "...D,VD->...V", preferred_element_type=jnp.float32)
        logits, update = wide(hidden, self.head.astype(hidden.dtype)), self.head_update(hidden)
        if update is not None:
            logits += wide(update[0], update[1].astype(hidden.dtype))
        return capped(logits, self.spec.logit_softcap)

    def head_update(self, hidden: jax.Array, dropout_key: jax.Array | None = None):
        """Arrays [..., R] and [V, R] whose product an adapted head adds to the logits of hidden
        [..., D], or None.
        """
        return None if self.head_lora is None else self.head_lora.before_head(hidden, dropout_key)

    def _mask(self, tokens, positions, segments, index, pattern: AttentionPattern) -> Mask:
        ordered = index is None
        if ordered:
            index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        anchors = None
        if pattern.kind == "window" and (pattern.anchors or pattern.markers):
            anchors = (positions < pattern.anchors) | jnp.isin(
                tokens, jnp.asarray(pattern.markers, tokens.dtype)
            )
        return Mask(index, index, segments, segments, anchors, ordered=ordered)


def noisy(x: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """Embeddings x [B, T, D] with noise uniform within alpha / sqrt(T * D): NEFTune, Jain et al.
    2023, arXiv 2310.05914.

    T is the row's length, padding and packed documents included, as in transformers and TRL.
    """
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    return x + jax.random.uniform(key, x.shape, x.dtype, -bound, bound)


def share_residuals(layers: tuple[LayerSpec, ...], each: int) -> bool:
    """Whether one residual per `each` layers can be kept: see `repeats`."""
    return all(groups_layers(each, len(places), times) for _, places, times in repeats(layers))
