"""Weights between HuggingFace tensors and declared Variables, one tensor at a time in both
directions.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.errors import ModelError
from lljax.models.declare import LoraWeight, Weight, declared, dtype_of, hf_names, stacked
from lljax.models.quantize import Quantised, dequantise, quantise
from lljax.parallel.sharding import put

# buffers that old checkpoints still carry
HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def load_weights(model: nnx.Module, base, *, dtype, shardings=None) -> dict[str, int]:
    """Fills every base Variable of an abstract model from `base` (lljax.interop.open); adapters
    stay abstract.

    Trainable Variables become float32, the others `dtype`. `shardings(variable)`, where given, is
    where a value goes.
    The host holds about one tensor at a time: a stacked value is allocated in place and written
      layer by layer. Kernels that are quantised in the abstract model are quantised on the way, or
      taken as they are where the base has them so.

    Returns the `checksums` of what was read.

    Raises:
      ModelError: a tensor is missing, has another shape, or is of a type that is no weight's; the
        line names it.
    """
    available, used, sums = set(base.names()), set(), {}
    for _, variable in declared(model):
        if isinstance(variable, LoraWeight):
            continue
        names = hf_names(variable)
        for name in names:
            if name not in available:
                raise ModelError(f"{base.path}: tensor {name!r} is missing")
            if base.shape(name) != hf_shape(variable):
                raise ModelError(
                    f"{base.path}: tensor {name!r} has shape {base.shape(name)}, and config.json makes it "
                    f"{hf_shape(variable)}"
                )
            if not jnp.issubdtype(base.dtype(name), jnp.floating) or base.dtype(name).itemsize < 2:
                raise ModelError(
                    f"{base.path}: tensor {name!r} is {base.dtype(name)}, and config.json has no "
                    "quantization_config that says how to read it"
                )
        used.update(names)
        wanted = dtype_of(variable, dtype)
        sharding = shardings(variable) if shardings else None
        transpose, part = variable.get_metadata("transpose"), hf_part(variable)

        outline = variable.get_value()

        def read(
            name, first=names[0], transpose=transpose, wanted=wanted, part=part, outline=outline
        ):
            sums[first] = base.checksum(name, sums.get(first, 0))
            whole = part == ...  # a part of a fused tensor is quantised anew
            stored = (
                base.stored(name, outline.form)
                if whole and isinstance(outline, Quantised)
                else None
            )
            if stored is not None:
                return dataclasses.replace(stored, dtype=outline.dtype)
            array = base.read(name)[part]
            return np.asarray(np.swapaxes(array, -1, -2) if transpose else array, dtype=wanted)

        if held := stacked(variable):
            value = jax.jit(functools.partial(_zeros, outline, wanted), out_shardings=sharding)()
            for i, name in enumerate(names):
                value = _set_part(value, read(name), np.unravel_index(i, outline.shape[:held]))
        elif isinstance(outline, Quantised):
            quantised = functools.partial(quantise, form=outline.form, dtype=outline.dtype)
            value = jax.jit(quantised, out_shardings=sharding)(read(names[0]))
        else:
            value = put(read(names[0]), sharding)
        variable.set_value(value)
    ignored = sorted(
        name
        for name in available - used
        if not name.endswith(HARMLESS) and name != "lm_head.weight"
    )
    if ignored:
        logging.warning(
            "%s: %d tensors are not part of the model and were not read, such as %s",
            base.path,
            len(ignored),
            ", ".join(ignored[:3]),
        )
    return sums


def checksums(model: nnx.Module, base) -> dict[str, int]:
    """{first tensor: crc32 of all} of the tensors that each base Variable is made of, as they are
    on disk: whatever a run makes of them, and wherever, they are the same.
    """
    sums = {}
    for _, variable in declared(model):
        if not isinstance(variable, LoraWeight):
            names = hf_names(variable)
            for name in names:
                sums[names[0]] = base.checksum(name, sums.get(names[0], 0))
    return sums


def _zeros(outline, dtype):
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype if isinstance(outline, Quantised) else dtype), outline
    )


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(whole, part, at):
    if isinstance(whole, Quantised) and not isinstance(part, Quantised):
        part = quantise(part, whole.form, whole.dtype)
    return jax.tree.map(lambda all, one: all.at[at].set(one), whole, part)


def tensors(model: nnx.Module, kind=Weight) -> Iterator[tuple[str, np.ndarray]]:
    """(HF name, array in HF orientation) of every Variable of `kind`, one tensor at a time."""
    for name, parts in parts_of(model, kind).items():
        yield name, joined(parts)


def parts_of(model: nnx.Module, kind=Weight) -> dict[str, list[tuple[nnx.Variable, int]]]:
    """What each HF tensor is made of: Variables, and which of their layers. Nearly always one."""
    parts = {}
    for _, variable in declared(model):
        if isinstance(variable, kind):
            for i, name in enumerate(hf_names(variable)):
                parts.setdefault(name, []).append((variable, i))
    return parts


def joined(parts: list[tuple[nnx.Variable, int]]) -> np.ndarray:
    """One HF tensor of its parts, see `parts_of`."""
    if len(parts) == 1:
        return hf_value(*parts[0])
    whole = None
    for variable, i in parts:
        value = hf_value(variable, i)
        whole = np.empty(hf_shape(variable), value.dtype) if whole is None else whole
        whole[hf_part(variable)] = value
    return whole


def hf_part(variable: nnx.Variable):
    """What of its HF tensors a Variable holds, as an index: all, or some of the outputs."""
    if "part" not in variable.get_metadata():
        return ...
    first, step, _ = variable.get_metadata("part")
    outputs = slice(first, first + step * variable.get_value().shape[-1], step)
    return (..., outputs, slice(None)) if variable.get_metadata("transpose") else (..., outputs)


def hf_value(variable: nnx.Variable, i: int = 0) -> np.ndarray:
    """What it has of the i-th of its HF tensors (`hf_names`), in HF orientation, on the host."""
    value = variable.get_value()
    if held := stacked(variable):
        at = np.unravel_index(i, value.shape[:held])
        value = jax.tree.map(lambda x: x[at], value)
    array = np.asarray(dequantise(value, value.dtype) if isinstance(value, Quantised) else value)
    return np.swapaxes(array, -1, -2) if variable.get_metadata("transpose") else array


def hf_shape(variable: nnx.Variable) -> tuple[int, ...]:
    """The shape of each of its HF tensors."""
    *rest, outputs = variable.get_value().shape[stacked(variable) :]
    *_, outputs = variable.get_metadata().get("part", (outputs,))
    return (
        (*rest[:-1], outputs, rest[-1]) if variable.get_metadata("transpose") else (*rest, outputs)
    )
