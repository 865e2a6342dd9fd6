"""One declaration per parameter: shape, logical axes, HF name and role live on the Variable itself.

A model is built abstract: every Variable holds a `jax.ShapeDtypeStruct`. Initialisation, sharding,
  loading, LoRA targets and export walk the declared Variables (`declared`) and need no table of
  their own.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx


class Weight(nnx.Param):
    """A parameter of the base model.

    Metadata:
      hf: HF tensor name; a stacked Weight has "{layer}" in it and a leading axis of layers, one of
        several experts "{expert}" and the next axis.
      layers: of a stacked Weight, (first, step): it holds the layers first, first + step, ... of
        the model.
      part: of a Weight that HF keeps with others in one tensor, (first, step, all): it has the
        outputs first, first + step, ... of the `all` that are there.
      transpose: HF stores the (per-layer) matrix the other way round ([out, in]; ours is [in,
        out]).
      axes: logical axis names, one per dimension (see lljax.parallel.sharding).
      role: "kernel" | "bias" | "embed" | "norm" | "head" | "router": the name by which optimizer
        groups and `lora.also_train` refer to it.
      init: "normal" | "zeros" | "ones" | "unit_normal" | "he_uniform" | "norms" (those of the
        adapted kernel).
    """


class LoraWeight(nnx.Variable):
    """A part of an adapter, with the metadata of `Weight`; role is "lora_a", "lora_b" or
    "lora_magnitude". `part` is that of the weight it adapts.

    Its `hf` is the PEFT name without the "base_model.model." prefix, for example
    "model.layers.{layer}.self_attn.q_proj.lora_A.weight".
    """


def declare(shape, *, axes, hf, role, init="normal", transpose=False, kind=Weight, **more):
    """An abstract float32 Variable of `kind` with the metadata described in `Weight`."""
    assert len(shape) == len(axes), (hf, shape, axes)
    return kind(
        jax.ShapeDtypeStruct(tuple(shape), jnp.float32),
        hf=hf,
        transpose=transpose,
        axes=tuple(axes),
        role=role,
        init=init,
        **more,
    )


def dtype_of(variable: nnx.Variable, dtype):
    """Of its value, where the run has `dtype`: what trains, and what chooses experts, is
    float32.
    """
    keep = (
        variable.get_metadata().get("trainable", False) or variable.get_metadata("role") == "router"
    )
    return jnp.float32 if keep else dtype


def declared(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Variable]]:
    """Every declared Variable of `model` with its path, in a stable order. The Variables
    themselves, not copies.
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, (Weight, LoraWeight)):
            yield path, node


def stack(layer: nnx.Module, times: int, first: int, step: int) -> nnx.Module:
    """Gives every Variable of an abstract `layer` a leading axis, to be scanned over: it stands for
    `times` layers of the model, the `first` and every `step`-th after it.
    """
    for _, variable in declared(layer):
        value = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct((times, *value.shape), value.dtype))
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")), layers=(first, step))
    return layer


def hf_names(variable: nnx.Variable) -> list[str]:
    """Its HF tensors: layer after layer, and of each layer expert after expert."""
    name, shape = variable.get_metadata("hf"), variable.get_value().shape
    first, step = variable.get_metadata().get("layers", (0, 1))
    ranges = {
        "layer": range(first, first + shape[0] * step, step),
        "expert": range(shape[stacked(variable) - 1]),
    }
    varying = [kind for kind in ranges if f"{{{kind}}}" in name]
    return [
        name.format(**dict(zip(varying, at)))
        for at in itertools.product(*(ranges[kind] for kind in varying))
    ]


def stacked(variable: nnx.Variable) -> int:
    """How many of its leading axes, of layers and of experts, count HF tensors."""
    return sum(kind in variable.get_metadata("hf") for kind in ("{layer}", "{expert}"))
