"""A HF checkpoint of a trained model, written one tensor at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.adapter_init import ResidualBase, owns_kernel, starts_from_base
from lljax.interop.base import Base
from lljax.interop.export_files import write_files
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value, join_parts, parts_of
from lljax.models.decoder import Decoder
from lljax.models.lora import Lora, adaptable
from lljax.models.lora_layers import TableLora


class Update(NamedTuple):
    """An adapter of one part of a HF tensor."""

    kernel: nnx.Variable
    lora: Lora | TableLora
    index: int  # index of the tensor among the kernel's


class Tensors(NamedTuple):
    """The tensors of a checkpoint by HF name: how to compute each, and the names of those that are
    copied from the base.
    """

    sources: dict[str, Callable[[], np.ndarray]]
    copied: set[str]


def write_model(
    model: Decoder,
    base: Base,
    folder: Path,
    *,
    merge: bool,
    dtype: str | None,
    chat_template: str | None,
    max_shard_bytes: int,
) -> str:
    """Writes a HF checkpoint of the model's base weights, with the adapter added if `merge`.

    Returns a comment on trained weights that were rounded to the dtype of the base, or an empty
    text.

    Raises:
      ConfigError: a weight is not finite in the dtype that is written.
    """
    tokenizer = base.tokenizer()  # first: a base without one fails before the long write
    parts = parts_of(model)
    trained = {name: of[0][0].get_metadata().get("trainable", False) for name, of in parts.items()}
    # A run that trained every weight reads none of the base's, which may have none.
    available = set() if all(trained.values()) else set(base.names())
    unchanged = {name for name in parts if not trained[name] and name in available}
    sources, copied = _tensors(model, base, unchanged, merge)
    dtypes = _dtypes(sources, base, available, dtype)

    def value(name: str) -> np.ndarray:
        read = np.asarray(sources[name]())
        with np.errstate(over="ignore"):  # reported below
            written = read.astype(dtypes[name])
        if (name not in copied or read.dtype != written.dtype) and not np.isfinite(written).all():
            advice = "export an earlier --step"
            if np.isfinite(read).all():
                advice = "use --dtype=bfloat16"
            raise ConfigError(f"tensor {name!r} is not finite in {dtypes[name]}: {advice}")
        return written

    layout = {name: (dtypes[name], hf_shape(of[0][0])) for name, of in parts.items()}
    safetensors.write_sharded(folder, layout, value, max_shard_bytes=max_shard_bytes)
    write_files(base, folder, model.spec, tokenizer, dtype=dtype, chat_template=chat_template)
    narrow = {str(dtypes[name]) for name in sources.keys() - copied if dtypes[name].itemsize < 4}
    if dtype or not narrow:
        return ""
    return (
        f"\n# Trained weights are rounded to {' and '.join(sorted(narrow))}, the type of the base: "
        "--dtype=float32 writes all weights in float32."
    )


def _tensors(model: Decoder, base: Base, unchanged: set[str], merge: bool) -> Tensors:
    """The tensors of the model; unchanged: names that the base has and the run did not train."""
    updates: dict[str, list[Update]] = {}
    replaced: dict[str, list[Update]] = {}  # kernels that exist in the run alone
    for _, weight, lora in adaptable(model):
        if lora is None:
            continue
        for i, name in enumerate(hf_names(weight)):
            if merge:
                updates.setdefault(name, []).append(Update(weight, lora, i))
            if owns_kernel(lora):
                replaced.setdefault(name, []).append(Update(weight, lora, i))
    started = ResidualBase(base, model) if starts_from_base(model) else base
    sources: dict[str, Callable[[], np.ndarray]] = {}
    copied = set()
    for name, parts in parts_of(model).items():
        if name not in unchanged:
            sources[name] = lambda parts=parts: join_parts(parts)
        elif name in replaced:  # with or without their factors
            sources[name] = lambda name=name: _merged(
                _with_kernels(base.read(name), replaced[name]), updates.get(name, [])
            )
        elif name in updates:  # onto the base's weight: the run's copy may be rounded
            sources[name] = lambda name=name: _merged(started.read(name), updates[name])
        else:  # bitwise the base's, whatever dtype the run computed in
            sources[name] = lambda name=name: base.read(name)
            copied.add(name)
    return Tensors(sources, copied)


def _dtypes(
    names: dict[str, Callable], base: Base, available: set[str], dtype: str | None
) -> dict[str, np.dtype]:
    """The dtype of every tensor: `dtype`, or else the base's."""
    usual = dtype or base.config.get("dtype") or base.config.get("torch_dtype") or "bfloat16"
    default = np.dtype(getattr(ml_dtypes, usual, usual))
    return {
        name: base.dtype(name) if name in available and not dtype else default for name in names
    }


def _with_kernels(weight: np.ndarray, kernels: list[Update]) -> np.ndarray:
    """The weight with the run's kernels in place of its parts, in float32."""
    weight = weight.astype(np.float32)  # a copy
    for kernel, _, i in kernels:
        weight[hf_part(kernel)] = hf_value(kernel, i)
    return weight


def _merged(weight: np.ndarray, updates: list[Update]) -> np.ndarray:
    """The weight with the adapters of its parts added, in float32."""
    weight = weight.astype(np.float32)  # a copy
    for kernel, lora, i in updates:
        # [..., out, in]
        part, update = hf_part(kernel), lora.scale * (hf_value(lora.b, i) @ hf_value(lora.a, i))
        weight[part] += np.swapaxes(update, -1, -2) if lora.turned else update
        if lora.magnitude is not None:
            norms = np.linalg.norm(weight[part], axis=1)
            weight[part] *= (hf_value(lora.magnitude, i) / norms)[:, None]
    return weight
