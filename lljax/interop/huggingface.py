"""Weights between HuggingFace tensors and declared Variables, one tensor at a time in both
directions.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.errors import ModelError
from lljax.interop.base import Base
from lljax.models.declare import LoraWeight, Weight, declared, dtype_of, hf_names, stacked_axes
from lljax.models.quantize import Quantized, dequantize, quantize
from lljax.parallel.sharding import put

# buffers that old checkpoints still carry
HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def load_weights(
    model: nnx.Module, base: Base, *, dtype: Any, shardings: Callable | None = None
) -> dict[str, int]:
    """Fills every base Variable of an abstract model from `base`; adapters stay abstract.

    Trainable Variables become float32, the others `dtype`. shardings(variable): the sharding of a
    value; None for the default device. The host holds about one tensor at a time: a stacked value
    is allocated in place and written layer by layer. Kernels that are quantized in the abstract
    model are quantized as they are read, or taken unchanged if the base has that form.

    Returns the `checksums` of the tensors that were read. Logs tensors of the base that are not
    part of the model.

    Raises:
      ModelError: a tensor is missing, has another shape, or its type is not a weight's; the message
        names it.
    """
    sums = load_part(model, base, dtype=dtype, shardings=shardings)
    if ignored := other_tensors(model, base):
        logging.warning(
            "%s: %d tensors are not part of the model and were not read, such as %s",
            base.path,
            len(ignored),
            ", ".join(ignored[:3]),
        )
    return sums


def other_tensors(model: nnx.Module, base: Base) -> list[str]:
    """Tensors of the base that are not part of the model, such as those of multi-token prediction;
    without buffers that nothing reads and the head of a tied model.
    """
    used = {name for _, x in declared(model) if isinstance(x, Weight) for name in hf_names(x)}
    return sorted(
        name
        for name in set(base.names()) - used
        if not name.endswith(HARMLESS) and name != "lm_head.weight"
    )


def load_part(
    part: nnx.Module, base: Base, *, dtype: Any, shardings: Callable | None = None
) -> dict[str, int]:
    """`load_weights` of a module that is part of a model, such as a layer."""
    available = set(base.names())
    sums: dict[str, int] = {}
    for _, variable in declared(part):
        if isinstance(variable, LoraWeight):
            continue
        names = hf_names(variable)
        for name in names:
            check_tensor(base, available, name, hf_shape(variable))

        def read(name: str, variable: nnx.Variable = variable, first: str = names[0]) -> Any:
            sums[first] = base.checksum(name, sums.get(first, 0))  # while its pages are in memory
            return _read(base, name, variable, dtype_of(variable, dtype))

        sharding = shardings(variable) if shardings else None
        variable.set_value(_value(variable, names, read, dtype_of(variable, dtype), sharding))
    return sums


def check_tensor(base: Base, available: set[str], name: str, shape: tuple[int, ...]) -> None:
    """Refuses a base without this tensor of this shape. available: the names of its tensors.

    Raises:
      ModelError: it is missing or of another shape.
    """
    if name not in available:
        raise ModelError(f"{base.path}: tensor {name!r} is missing")
    if base.shape(name) != shape:
        raise ModelError(
            f"{base.path}: tensor {name!r} has shape {base.shape(name)}, and config.json makes it "
            f"{shape}"
        )
    dtype = base.dtype(name)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ModelError(
            f"{base.path}: tensor {name!r} is {dtype}, and config.json has no quantization_config "
            "that says how to read it"
        )


def _read(base: Base, name: str, variable: nnx.Variable, dtype: Any) -> Any:
    """A tensor as one layer of a Variable holds it: an array, or a Quantized as it is stored."""
    outline, part = variable.get_value(), hf_part(variable)
    whole = part == ...  # a part of a fused tensor is quantized anew
    stored = base.stored(name, outline.form) if whole and isinstance(outline, Quantized) else None
    if stored is not None:
        return dataclasses.replace(stored, dtype=outline.dtype)
    array = base.read(name)[part]
    transposes = variable.get_metadata("transpose")
    return np.asarray(np.swapaxes(array, -1, -2) if transposes else array, dtype=dtype)


def _value(
    variable: nnx.Variable, names: list[str], read: Callable[[str], Any], dtype: Any, sharding: Any
) -> Any:
    """The value of a Variable, from the tensors that `read` returns."""
    outline = variable.get_value()
    if axes := stacked_axes(variable):
        value = jax.jit(functools.partial(_zeros, outline, dtype), out_shardings=sharding)()
        for i, name in enumerate(names):
            value = _set_part(value, read(name), np.unravel_index(i, outline.shape[:axes]))
        return value
    if isinstance(outline, Quantized):
        quantizes = functools.partial(quantize, form=outline.form, dtype=outline.dtype)
        return jax.jit(quantizes, out_shardings=sharding)(read(names[0]))
    return put(read(names[0]), sharding)


def checksums(model: nnx.Module, base: Base) -> dict[str, int]:
    """{first tensor: crc32 of all its tensors} of every base Variable, of the bytes on disk.

    They do not depend on the run's dtype, devices or quantization.
    """
    sums: dict[str, int] = {}
    for _, variable in declared(model):
        if not isinstance(variable, LoraWeight):
            names = hf_names(variable)
            for name in names:
                sums[names[0]] = base.checksum(name, sums.get(names[0], 0))
    return sums


def _zeros(outline: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype if isinstance(outline, Quantized) else dtype), outline
    )


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(whole: Any, part: Any, index: Any) -> Any:
    if isinstance(whole, Quantized) and not isinstance(part, Quantized):
        part = quantize(part, whole.form, whole.dtype)
    return jax.tree.map(lambda x, y: x.at[index].set(y), whole, part)


def tensors(model: nnx.Module, kind: type = Weight) -> Iterator[tuple[str, np.ndarray]]:
    """(HF name, array in HF orientation) of every Variable of `kind`, one tensor at a time."""
    for name, parts in parts_of(model, kind).items():
        yield name, join_parts(parts)


Part = tuple[nnx.Variable, int]  # a Variable, and the index of a tensor in `hf_names`


def parts_of(model: nnx.Module, kind: type = Weight) -> dict[str, list[Part]]:
    """The parts of every HF tensor; nearly always one."""
    parts: dict[str, list[Part]] = {}
    for _, variable in declared(model):
        if isinstance(variable, kind):
            for i, name in enumerate(hf_names(variable)):
                parts.setdefault(name, []).append((variable, i))
    return parts


def join_parts(parts: list[Part]) -> np.ndarray:
    """One HF tensor from its parts, see `parts_of`."""
    first = hf_value(*parts[0])
    if len(parts) == 1:
        return first
    whole = np.empty(hf_shape(parts[0][0]), first.dtype)
    for variable, i in parts:
        whole[hf_part(variable)] = hf_value(variable, i)
    return whole


def hf_part(variable: nnx.Variable) -> Any:
    """The part of its HF tensors that a Variable holds, as an index: all, or some outputs."""
    if "part" not in variable.get_metadata():
        return ...
    first, step, _ = variable.get_metadata("part")
    outputs = slice(first, first + step * variable.get_value().shape[-1], step)
    return (..., outputs, slice(None)) if variable.get_metadata("transpose") else (..., outputs)


def hf_value(variable: nnx.Variable, i: int = 0) -> np.ndarray:
    """Its values in the i-th of its HF tensors (`hf_names`), in HF orientation, on the host."""
    value = variable.get_value()
    if axes := stacked_axes(variable):
        index = np.unravel_index(i, value.shape[:axes])
        value = jax.tree.map(lambda x: x[index], value)
    array = np.asarray(dequantize(value, value.dtype) if isinstance(value, Quantized) else value)
    return np.swapaxes(array, -1, -2) if variable.get_metadata("transpose") else array


def hf_shape(variable: nnx.Variable) -> tuple[int, ...]:
    """The shape of every one of its HF tensors."""
    *rest, outputs = variable.get_value().shape[stacked_axes(variable) :]
    *_, outputs = variable.get_metadata().get("part", (outputs,))
    return (
        (*rest[:-1], outputs, rest[-1]) if variable.get_metadata("transpose") else (*rest, outputs)
    )
