"""A decoder whose layers have arrays of their own, for decoding.

Training scans over stacks of layers. A decoding step that cuts each layer out of its stack reads
and writes all weights once more for every token.
"""

import functools
from typing import Any

import jax
from flax import nnx

from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.spec import repeats, stacked


def split_layers(model: Decoder) -> Decoder:
    """`model` with one module per layer, in the order of the layers; it can be continued
    (`Decoder.continued`) and not called.

    The arrays of `model` are deleted, one stack after the other, so that only one of them is in
    memory twice.
    """
    if model.by_layer:
        return model
    stacks = [
        _layers_of(layers, times) for layers, times in zip(model.layers, _times(model), strict=True)
    ]
    layers = [stacks[number][i] for number, i in stacked(model.spec.layers)]
    for number, layer in enumerate(layers):
        for _, variable in declared(layer):
            metadata = dict(variable.get_metadata())
            del metadata["layers"]
            hf = metadata["hf"].replace("{layer}", str(number))
            variable.set_metadata(metadata | {"hf": hf, "axes": metadata["axes"][1:]})
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    model.layers, model.by_layer = nnx.List(layers), True
    return model


def _times(model: Decoder) -> list[int]:
    """The number of layers in each of its stacks."""
    return [times for _, pattern, times in repeats(model.spec.layers) for _ in pattern]


def _layers_of(layers: DecoderLayer, times: int) -> list[DecoderLayer]:
    """The layers of a stack, whose arrays are deleted."""
    graphdef, state = nnx.split(layers)
    leaves, treedef = jax.tree.flatten(state)
    cut = [_cut(leaf, times) for leaf in leaves]
    return [nnx.merge(graphdef, jax.tree.unflatten(treedef, one)) for one in zip(*cut, strict=True)]


def _cut(stack: jax.Array, times: int) -> list[Any]:
    """The `times` arrays of a stack, which is deleted."""
    cut = _slices(stack, times)
    jax.block_until_ready(cut)  # else the next stack is in memory twice before this one is gone
    stack.delete()
    return cut


@functools.partial(jax.jit, static_argnums=1)
def _slices(stack: jax.Array, times: int) -> list[jax.Array]:
    return [stack[i] for i in range(times)]
