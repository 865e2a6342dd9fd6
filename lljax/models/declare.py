"""One declaration per parameter: shape, logical axes, HF name and role live on the Variable itself.

A model is built abstract: every Variable holds a `jax.ShapeDtypeStruct`. Initialization, sharding,
loading, LoRA targets and export walk the declared Variables (`declared`) and need no table of their
own.
"""

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class Weight(nnx.Param):
    """A parameter of the base model.

    Metadata:
      hf: HF tensor name; a stacked Weight has "{layer}" in it and a leading axis of layers, a
        Weight of several experts "{expert}" and the next axis.
      layers: (first, step) of a stacked Weight, which holds the layers first, first + step, ... of
        the model.
      part: (first, step, all) of a Weight that HF fuses with others in one tensor: it has the
        outputs first, first + step, ... of the `all` outputs of the tensor.
      float32: the value is float32 whatever the dtype of the run.
      transpose: HF stores the (per-layer) matrix transposed ([out, in]; ours is [in, out]).
      axes: logical axis names, one per dimension (see lljax.parallel.sharding).
      role: "kernel" | "bias" | "embed" | "norm" | "head" | "router": the name by which optimizer
        groups and `lora.also_train` refer to it. "scale": a buffer of transformers, always frozen.
      init: "normal" | "zeros" | "ones" | "unit_normal" | "he_uniform" | "norms" (of the columns of
        the adapted kernel).
    """


class LoraWeight(nnx.Variable):
    """A part of an adapter, with the metadata of `Weight`; role is "lora_a", "lora_b" or
    "lora_magnitude", and `layers` and `part` are copied from the weight it adapts.

    Its `hf` is the PEFT name without the "base_model.model." prefix, for example
    "model.layers.{layer}.self_attn.q_proj.lora_A.weight".
    """


def declare(
    shape: tuple[int, ...],
    *,
    axes: tuple[str | None, ...],
    hf: str,
    role: str,
    init: str = "normal",
    transpose: bool = False,
    kind: type[nnx.Variable] = Weight,
    **more: Any,
) -> Any:
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


def dtype_of(variable: nnx.Variable, dtype: Any) -> Any:
    """The dtype of its value in a run with `dtype`: float32 for trainable weights, for routers and
    as declared.
    """
    metadata = variable.get_metadata()
    wide = metadata.get("trainable") or metadata.get("float32") or metadata["role"] == "router"
    return jnp.float32 if wide else dtype


def declared(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Variable]]:
    """Every declared Variable of `model` with its path, in a stable order. The Variables
    themselves, not copies.
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, (Weight, LoraWeight)):
            yield path, node


def stack(layer: Module, times: int, first: int, step: int) -> Module:
    """Adds a leading axis to every Variable of an abstract `layer`, to be scanned over: it stands
    for `times` layers of the model, the `first` and every `step`-th after it.
    """
    for _, variable in declared(layer):
        value = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct((times, *value.shape), value.dtype))
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")), layers=(first, step))
    return layer


def hf_names(variable: nnx.Variable) -> list[str]:
    """Its HF tensors: layer after layer, and in each layer expert after expert."""
    name, shape = variable.get_metadata("hf"), variable.get_value().shape
    first, step = variable.get_metadata().get("layers", (0, 1))
    ranges = {
        "layer": range(first, first + shape[0] * step, step),
        "expert": range(shape[stacked_axes(variable) - 1]),
    }
    varying = [kind for kind in ranges if f"{{{kind}}}" in name]
    return [
        name.format(**dict(zip(varying, numbers, strict=True)))
        for numbers in itertools.product(*(ranges[kind] for kind in varying))
    ]


def stacked_axes(variable: nnx.Variable) -> int:
    """How many of its leading axes, of layers and of experts, count HF tensors."""
    return sum(kind in variable.get_metadata("hf") for kind in ("{layer}", "{expert}"))
