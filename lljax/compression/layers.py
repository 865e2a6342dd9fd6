"""A decoder one layer at a time: the weights of one layer and one row of tokens are on the device,
the hidden states of all rows wait in host memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.build import sharding_of
from lljax.compression.observe import Observed, observed
from lljax.interop.base import Base
from lljax.interop.huggingface import load_part
from lljax.models.decoder import Decoder
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.memory import Memory
from lljax.models.spec import DecoderSpec, LayerSpec
from lljax.parallel.sharding import Layout, batch_sharding, put


@dataclasses.dataclass(frozen=True)
class Rows:
    """Calibration rows, all of one length: int32 [rows, T] as in a training batch. Padding has
    segment 0.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def count(self) -> int:
        """The tokens that are no padding."""
        return int((self.segments > 0).sum())


class LayerStream:
    """Runs rows through the layers of a decoder in turn.

    hidden: the hidden states [rows, T, D] before the next layer, in host memory.

    rows: None for none. dtype: of the weights and of the hidden states. layout: how a row lies on a
    mesh; None for one device. tile: tokens that norms, projections and MLPs compute at a time; 0
    for all.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        rows: Rows | None,
        *,
        dtype: Any,
        layout: Layout | None = None,
        tile: int = 0,
    ):
        self._decoder, self._dtype = Decoder(spec), jnp.dtype(dtype)
        nothing = np.zeros((0, 0), np.int32)
        self._rows = rows or Rows(nothing, nothing, nothing)
        self._layout, self._memory = layout, Memory(tile=tile)
        self.hidden = np.empty((0, 0, spec.D), self._dtype)

    def embed(self, base: Base) -> None:
        """Sets `hidden` to the embeddings of the rows."""
        if not len(self._rows):
            return
        part = nnx.List([self._decoder.embed])
        load_part(part, base, dtype=self._dtype, shardings=sharding_of(self._layout))
        embed = jax.jit(lambda tokens: self._decoder.embedded(tokens, self._dtype, self._layout))
        shape = (*self._rows.tokens.shape, self._decoder.spec.D)
        self.hidden = np.empty(shape, self._dtype)
        for i, (tokens, _, _) in enumerate(self._arrays()):
            self.hidden[i] = np.asarray(embed(tokens))[0]
        outline = self._decoder.embed.get_value()
        self._decoder.embed.set_value(jax.ShapeDtypeStruct(outline.shape, outline.dtype))

    def load(self, base: Base, number: int) -> DecoderLayer:
        """A layer with its weights."""
        layer = abstract_layer(self._decoder.spec, number)
        load_part(layer, base, dtype=self._dtype, shardings=sharding_of(self._layout))
        return layer

    def observe(self, layer: DecoderLayer) -> Observed:
        """The sums over what the linear layers of the next layer read in all rows."""
        program, weights = self._program(layer, "observe")
        sums = None
        for x, (_, segments, positions) in zip(self.hidden, self._arrays(), strict=True):
            sums = program(weights, self._put(x[None]), segments, positions, sums)
        return sums or {}

    def advance(self, layer: DecoderLayer) -> None:
        """Runs all rows through the next layer."""
        program, weights = self._program(layer, "forward")
        for i, (_, segments, positions) in enumerate(self._arrays()):
            x = program(weights, self._put(self.hidden[i][None]), segments, positions)
            self.hidden[i] = np.asarray(x)[0]

    def _arrays(self) -> Iterable[tuple[jax.Array, jax.Array, jax.Array]]:
        rows = self._rows
        for i in range(len(rows)):
            each = (rows.tokens, rows.segments, rows.positions)
            tokens, segments, positions = (self._put(x[i : i + 1]) for x in each)
            yield tokens, segments, positions

    def _put(self, x: np.ndarray) -> jax.Array:
        mesh = self._layout and self._layout.mesh
        if mesh is None:
            return jnp.asarray(x)
        sharding = batch_sharding(mesh, 2)
        return put(x, sharding)

    def _program(self, layer: DecoderLayer, name: str) -> tuple[Callable, Any]:
        """A compiled program for layers of this kind, and the weights of this one."""
        _, weights = nnx.split(layer)
        program = layer_programs(self._decoder.spec, layer.layer, self._layout, self._memory)[name]
        return program, nnx.as_pure(weights)


def abstract_layer(spec: DecoderSpec, number: int) -> DecoderLayer:
    """The layer of this number by itself, without values."""
    return DecoderLayer(spec, spec.layers[number], hf=f"model.layers.{number}")


@functools.cache
def layer_programs(
    spec: DecoderSpec, kind: LayerSpec, layout: Layout | None, memory: Memory
) -> dict[str, Callable]:
    """Functions of (weights, x [B, T, D], segments, positions): `forward` returns x after a layer,
    `observe`, with the sums before (None for none), the sums after.
    """
    graphdef, outline = nnx.split(DecoderLayer(spec, kind))
    decoder = Decoder(spec)

    def context(segments, positions):
        return decoder.context(
            kind, positions=positions, segments=segments, layout=layout, memory=memory
        )

    def module(weights) -> DecoderLayer:
        state = jax.tree.map(
            lambda variable, value: variable.replace(value),
            outline,
            weights,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return nnx.merge(graphdef, state)

    def forward(weights, x, segments, positions):
        return module(weights)(x, context(segments, positions))[0]

    def observe(weights, x, segments, positions, sums):
        layer = module(weights)
        return observed(layer, x, context(segments, positions), segments > 0, sums)

    return {"forward": jax.jit(forward), "observe": jax.jit(observe, donate_argnums=4)}
