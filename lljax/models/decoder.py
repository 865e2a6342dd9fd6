"""The decoder: embed, scan over the stacked layers, norm. One file for every family; the spec says
how families differ.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lljax.attention import Mask
from lljax.attention.mask import NEVER, branched, chunked, of_keys
from lljax.attention.pattern import FULL, AttentionPattern
from lljax.attention.softcap import apply_softcap
from lljax.errors import ConfigError
from lljax.models import rope
from lljax.models.cache import Cache
from lljax.models.context import LayerContext, TrunkContext
from lljax.models.declare import declare, declared, stack
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.flops import RowFlops, TokenFlops, weight_flops
from lljax.models.linear import RMSNorm
from lljax.models.memory import EVERYTHING, Memory, groups_layers, scan_layers
from lljax.models.mixers import refuses_branches
from lljax.models.mixers.mixer import State
from lljax.models.probe import lookup_rows
from lljax.models.quantize import dense, dequantized
from lljax.models.router import Load
from lljax.models.spec import DecoderSpec, LayerSpec, repeats, stacked
from lljax.models.tables import Tables, table_product
from lljax.parallel.sharded_embedding import lookup
from lljax.parallel.sharding import (
    Layout,
    constrain_activations,
    gather_for_compute,
    token_parts,
)


class Decoder(nnx.Module):
    """A causal language model, abstract until initialized (lljax.models.initialize) or loaded
    (lljax.interop).
    """

    def __init__(self, spec: DecoderSpec):
        self.spec = spec
        self.by_layer = False  # see lljax.models.by_layer
        self.embed = declare(
            (spec.V, spec.D), axes=("vocab", "embed"), hf="model.embed_tokens.weight", role="embed"
        )
        # Layers that alternate are a stack each, in the order of `repeats`.
        self.layers = nnx.List(
            [
                stack(DecoderLayer(spec, layer), times, first + offset, len(pattern))
                for first, pattern, times in repeats(spec.layers)
                for offset, layer in enumerate(pattern)
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
        """The output matrix [V, D], an array, lljax.models.probe.ProbedWeight or
        lljax.models.tables.Tables; the embedding itself if the two are tied.
        """
        return dense(self._head_weight.get_value())

    @property
    def _head_weight(self) -> nnx.Variable:
        return self.embed if self.lm_head is None else self.lm_head

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        index: Int[Array, "B T"] | None = None,
        branches: Int[Array, "B T"] | None = None,
        pattern: AttentionPattern = FULL,
        layout: Layout | None = None,
        memory: Memory = EVERYTHING,
        dtype=None,
        dropout_key: jax.Array | None = None,
        rope_length: int | jax.Array | None = None,
        neftune_alpha: float = 0.0,
        counted: Bool[Array, "B T"] | None = None,
    ):
        """The hidden states [B, T, D] that `head` turns into logits.

        positions: position of each token in its document: 0, 1, 2 ... in each document of a row. In
          every branch they continue from the end of the trunk.
        segments: document of each token, 0 for padding; None for one document per row.
        index: index of each token in its row, which may come in any order; None for 0, 1, 2 ...
          With branches the positions take its place.
        branches: branch of each token, for prompts with several answers: 0 for the prompt (the
          trunk of its segment), 1, 2 ... for its answers, which see the trunk and not each other.
          Needs segments. None for no branches. An answer gets the hidden states that it has in a
          row of its own, after its prompt.
        layout: how all arrays lie on a mesh; None for one device. memory: see Memory.
        dtype: the dtype of the residual and the compute; None for the dtype of the weights.
        rope_length: positions in use, for a RoPE kind that depends on it; None for the largest
          position + 1.
        neftune_alpha: noise on the embeddings, see `neftune_noise`; none without a dropout key.
        counted: the tokens whose routing is counted, if the model has experts. (hidden, load) is
          returned, load float32 [layers with experts, 2, E]: how many tokens chose each expert, and
          the sum of its probabilities (lljax.models.router).

        Raises:
          ConfigError: a mixer of the model cannot serve branches.
        """
        if branches is not None and (
            reason := refuses_branches(self.spec.layers, token_parts(layout))
        ):
            raise ConfigError(reason)
        dtype = dtype or self._dtype()
        x = self.embedded(tokens, dtype, layout)
        if neftune_alpha and dropout_key is not None:
            x = constrain_activations(neftune_noise(x, neftune_alpha, dropout_key), layout)
        assert not self.by_layer, "a model by layer is continued, not called"
        by_rope = self._positions_by_rope(positions, rope_length)
        mask = self._mask(tokens, positions, segments, index, pattern)
        if branches is not None:
            mask = branched(mask, positions, branches)

        def context_of(layer: LayerSpec) -> LayerContext:
            return LayerContext(
                positions=by_rope[layer.rope],
                mask=_mask_of_layer(mask, layer, pattern, positions, positions),
                pattern=pattern,
                layout=layout,
                memory=memory,
                counted=counted,
            )

        x, loads = self._run_layers(x, context_of, dropout_key, memory, layout)
        x = self._before_head(x)
        if counted is not None:
            return x, jnp.concatenate([load.sum((1, 2)) for load in loads if load is not None])
        return x

    def continued(
        self,
        cache: Cache,
        tokens: Int[Array, "B T"],
        *,
        count: Int[Array, " B"] | None = None,
        dtype: Any = None,
        rope_length: int | Int[Array, " B"] | None = None,
        layout: Layout | None = None,
        specs: Sequence[DecoderSpec] = (),
        models: Int[Array, " B"] | None = None,
        trunk: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The hidden states of tokens that follow those in the cache, and the cache after them.
        Attention is full.

        count: how many tokens of each row are real, the rest being padding; None for all.
        dtype, layout: see `__call__`. rope_length: of each row, for a RoPE kind that depends on it.
        specs, models: the models of a mixed one, whose RoPE may differ, and the model of each row
          (lljax.models.by_row); None for one model.
        trunk: the cache of a prompt that all rows continue, `cache` being forked from it
          (lljax.models.cache.fork) and holding their own tokens only. It has one row, or over a
          mesh one for each device that shares rows, all alike. None if `cache` holds all tokens.

        The layers are unrolled, so that each writes into a state of its own in place.
        """
        dtype = dtype or self._dtype()
        positions = cache.used[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        slots = jnp.arange(cache.slots, dtype=jnp.int32)
        if trunk is not None:
            positions += trunk.used[0]
            slots = _slots_after(trunk, slots)
        slots = jnp.broadcast_to(slots, (len(tokens), *slots.shape))
        # Slots that are not taken yet come after every token, so that causality hides them.
        mask = Mask(positions, slots)
        length = None if rope_length is None else jnp.reshape(rope_length, (-1, 1))
        if models is None:
            by_rope = self._positions_by_rope(positions, length)
        else:
            choices = [self._positions_by_rope(positions, length, spec) for spec in specs]
            by_rope = {i: _of_rows([each[i] for each in choices], models) for i in choices[0]}
        modules = [nnx.split(layers) for layers in self.layers]
        x, states = self.embedded(tokens, dtype, layout), []
        for number, (layer, state) in enumerate(zip(self.spec.layers, cache.states, strict=True)):
            context = LayerContext(
                positions=by_rope[layer.rope],
                mask=_mask_of_layer(mask, layer, FULL, positions, slots),
                layout=layout,
                start=cache.used,
                count=count,
            )
            if trunk is not None:
                context = _beside_trunk(context, trunk, trunk.states[number])
            if self.by_layer:
                graphdef, weights = modules[number]
            else:
                stack, i = stacked(self.spec.layers)[number]
                graphdef, weights = modules[stack]
                weights = _layer_of_stack(weights, i, after=x)
            x, state, _ = _apply_layer(graphdef, weights, x, context, state)
            states.append(state)
        used = cache.used + (tokens.shape[1] if count is None else count)
        return self._before_head(x), dataclasses.replace(cache, states=tuple(states), used=used)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32."""
        head, update = self.head, self.head_update(hidden)
        mixed = isinstance(head, Tables)
        logits = head.logits(hidden) if mixed else table_product(hidden, head)
        if update is not None:
            logits += table_product(*update)
        return apply_softcap(logits, self.spec.logit_softcap)

    def _before_head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The hidden states that `head` turns into logits. They hold the factor of the logits, so
        that whatever multiplies them with the head gets it right.
        """
        x = self.norm(x)
        if self.spec.logit_scale == 1:
            return x
        # float32, because bfloat16 rounds the factor
        return (x.astype(jnp.float32) * self.spec.logit_scale).astype(x.dtype)

    def head_update(
        self, hidden: Float[Array, "... D"], dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, "... R"], Float[Array, "V R"]] | None:
        """Two arrays whose product an adapted head adds to the logits; None without an adapter."""
        return None if self.head_lora is None else self.head_lora.before_head(hidden, dropout_key)

    def token_flops(self) -> TokenFlops:
        """Products of one token with the weights of all layers, and with the adapters of embedding
        and head.
        """
        modules = [*self.layers, self.embed_lora, self.head_lora]
        flops = (module.token_flops() for module in modules if module is not None)
        return sum(flops, TokenFlops())

    def head_flops(self) -> TokenFlops:
        """The product of one token with the head."""
        return weight_flops(self._head_weight)

    def row_flops(self, T: int, pattern: AttentionPattern) -> list[RowFlops]:
        """Products between the T tokens of a row of one document, of each layer."""
        counts = [times for _, layers, times in repeats(self.spec.layers) for _ in layers]
        return [
            flops
            for layer, count in zip(self.layers, counts, strict=True)
            for flops in [layer.self_attn.row_flops(T, pattern)] * count
        ]

    def _dtype(self) -> jnp.dtype:
        """The dtype of the kernels of the layers, which all have the same."""
        return next(
            variable.get_value().dtype
            for _, variable in declared(self.layers[0])
            if variable.get_metadata("role") == "kernel"
        )

    def context(
        self,
        layer: LayerSpec,
        *,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        layout: Layout | None = None,
        memory: Memory = EVERYTHING,
    ) -> LayerContext:
        """The context of one layer alone, with full attention: what `__call__` passes to it."""
        mask = self._mask(positions, positions, segments, None, FULL)
        return LayerContext(
            positions=self._positions_by_rope(positions, None)[layer.rope],
            mask=_mask_of_layer(mask, layer, FULL, positions, positions),
            layout=layout,
            memory=memory,
        )

    def embedded(
        self, tokens: Int[Array, "B T"], dtype, layout: Layout | None = None
    ) -> Float[Array, "B T D"]:
        """The input of the first layer."""
        table = dense(self.embed.get_value())
        if isinstance(table, Tables):
            x = table.lookup(tokens, dtype)
        else:
            x = lookup_rows(table, tokens, dtype=dtype, layout=layout)
        if self.embed_lora is not None:
            a = lookup(self.embed_lora.a[...], tokens, dtype=dtype, layout=layout)
            x += self.embed_lora.of_rows(a)
        if self.spec.embed_scale != 1:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        return x

    def _positions_by_rope(
        self,
        positions: Int[Array, "B T"],
        rope_length: int | jax.Array | None,
        spec: DecoderSpec | None = None,
    ) -> dict[int | None, rope.Positions]:
        """The positions as layers use them, for each value of `LayerSpec.rope`. spec: in place of
        the decoder's.
        """
        spec = spec or self.spec
        length = jnp.max(positions) + 1 if rope_length is None else rope_length
        rotated = unrotated = None
        if spec.temperature is not None:
            factor = rope.temperature(positions, spec.temperature)
            rotated, unrotated = (factor, None) if spec.temperature.rotated else (None, factor)
        by_rope: dict[int | None, rope.Positions] = {None: rope.Positions(None, unrotated)}
        for i, kind in enumerate(spec.ropes):
            frequencies = rope.frequencies(kind, spec.rotary(i), length)
            by_rope[i] = rope.Positions(rope.rotation(positions, frequencies), rotated)
        return by_rope

    def _mask(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        index: Int[Array, "B T"] | None,
        pattern: AttentionPattern,
    ) -> Mask:
        """The mask that all layers share."""
        ordered = index is None
        if index is None:
            index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        anchors = None
        if pattern.anchors or pattern.markers:
            anchors = (positions < pattern.anchors) | jnp.isin(
                tokens, jnp.asarray(pattern.markers, tokens.dtype)
            )
        return Mask(index, index, segments, segments, anchors, ordered=ordered)

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        context_of: Callable[[LayerSpec], LayerContext],
        dropout_key: jax.Array | None,
        memory: Memory,
        layout: Layout | None,
    ):
        """x [B, T, D] after all layers, and the loads of the experts of each stack of layers."""
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.spec.L)
        loads: list[Load | None] = []
        for first, pattern, times in repeats(self.spec.layers):
            layers, xs = [], []
            for offset, layer in enumerate(pattern):
                graphdef, weights = nnx.split(self.layers[len(loads) + offset])
                numbers = slice(first + offset, first + times * len(pattern), len(pattern))
                layers.append(_scanned(graphdef, context_of(layer)))
                xs.append((weights, None if keys is None else keys[numbers]))
            x, ys = scan_layers(layers, x, tuple(xs), memory, layout)
            loads.extend(ys)
        return x, loads


def _scanned(graphdef: nnx.GraphDef, context: LayerContext) -> Callable:
    """One layer of a stack as a function for `scan_layers`."""

    def layer(x, xs):
        weights, key = xs
        x, _, load = _apply_layer(graphdef, weights, x, context.replace(dropout_key=key), None)
        return x, load

    return layer


def _apply_layer(
    graphdef: nnx.GraphDef, weights: Any, x: Float[Array, "B T D"], context: LayerContext, state
) -> tuple[Float[Array, "B T D"], State | None, Load | None]:
    """A `DecoderLayer` of these weights, one layer of a stack, that may lie cut or quantized."""
    weights = dequantized(gather_for_compute(weights, context.layout), x.dtype)
    x, state, load = nnx.merge(graphdef, weights)(x, context, state)
    return constrain_activations(x, context.layout), state, load


def _layer_of_stack(weights: Any, i: int, after: jax.Array) -> Any:
    """The weights of the i-th layer of a stack, which the compiler cannot cut before `after` is
    computed: the layers of the whole stack would be in memory twice.
    """
    first = after.ravel()[0]
    # 0, but no compiler knows it: a number is not both above and below 0
    late = jnp.int32(i) + ((first > 0) & (first < 0))
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, late, keepdims=False), weights)


def _of_rows(choices: list[rope.Positions], models: Int[Array, " B"]) -> rope.Positions:
    """The positions of each row under its own model."""
    rows = jnp.arange(len(models))
    return jax.tree.map(lambda *arrays: jnp.stack(arrays)[models, rows], *choices)


def _slots_after(trunk: Cache, slots: Int[Array, " S"]) -> Int[Array, " slots"]:
    """The places of the slots of a trunk, and then of the slots of a row that continues it."""
    used = trunk.used[0]
    places = jnp.arange(trunk.slots, dtype=jnp.int32)
    return jnp.concatenate([jnp.where(places < used, places, NEVER), used + slots])


def _beside_trunk(context: LayerContext, trunk: Cache, state: State) -> LayerContext:
    """The context of a layer, whose mask has the slots of `trunk` and of the rows (`_slots_after`),
    with the mask in two.
    """
    of_trunk = of_keys(context.mask, lambda x: x[:, : trunk.slots])
    return context.replace(
        mask=of_keys(context.mask, lambda x: x[:, trunk.slots :]),
        trunk=TrunkContext(state, trunk.used, of_trunk),
    )


def _mask_of_layer(
    mask: Mask,
    layer: LayerSpec,
    pattern: AttentionPattern,
    positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
) -> Mask:
    """The mask with the window of the layer and of the pattern, or the chunks of the layer."""
    windows = (pattern.window, None if layer.chunked else layer.window)
    mask = mask.replace(window=min((window for window in windows if window), default=None))
    if not layer.chunked:
        return mask
    assert layer.window is not None, "a chunked layer has the length of its chunks as window"
    return chunked(mask, positions, k_positions, layer.window)


def neftune_noise(x: Float[Array, "B T D"], alpha: float, key: jax.Array) -> Float[Array, "B T D"]:
    """Embeddings x with noise uniform within alpha / sqrt(T * D): NEFTune, Jain et al. 2023,
    arXiv 2310.05914.

    T is the length of the row, padding and packed documents included, as in transformers and TRL.
    key: the dropout key of the whole model.
    """
    key = jax.random.fold_in(key, zlib.crc32(b"noise"))
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    return x + jax.random.uniform(key, x.shape, x.dtype, -bound, bound)


def can_share_residuals(layers: tuple[LayerSpec, ...], layers_per_residual: int) -> bool:
    """Whether one residual per `layers_per_residual` layers can be kept, see `repeats`."""
    return all(
        groups_layers(layers_per_residual, len(pattern), times)
        for _, pattern, times in repeats(layers)
    )
