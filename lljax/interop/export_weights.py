"""A HF checkpoint of a trained model, written one tensor at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.adapter_init import ResidualBase, owns_kernel, starts_from_base
from lljax.interop.base import Base, BaseView, config_dtype
from lljax.interop.export_files import write_files
from lljax.interop.huggingface import (
    check_tensor,
    hf_names,
    hf_part,
    hf_shape,
    hf_value,
    join_parts,
    other_tensors,
    parts_of,
)
from lljax.models.decoder import Decoder
from lljax.models.lora import Lora, adaptable
from lljax.models.lora_layers import TableLora
from lljax.models.quantize import Form, Quantized


class Update(NamedTuple):
    """An adapter of one part of a HF tensor."""

    kernel: nnx.Variable
    lora: Lora | TableLora
    index: int  # index of the tensor among the kernel's


class MergedBase(BaseView):
    """A trained model as a base: its base with the adapter added to the weights.

    merge: False for the weights without the adapter. dtype: of every tensor; None for the dtypes of
    the base, to which trained weights are rounded.

    has_base: whether any tensor is the base's.
    `read` returns a merged weight in float32, and rounds no other; tensors in `copied` are bitwise
    the base's. `generation_config` and tokenizer are the base's, and config.json lacks the RoPE of
    the run (lljax.interop.export_files writes it).

    Raises:
      ModelError: a tensor of the base is missing or has another shape than config.json makes it.
    """

    def __init__(self, model: Decoder, base: Base, *, merge: bool = True, dtype: str | None = None):
        super().__init__(base)
        self._parts = parts_of(model)
        trains = {
            name: of[0][0].get_metadata().get("trainable", False)
            for name, of in self._parts.items()
        }
        # A run that trained every weight reads none of the base's, which may have none.
        self.has_base = not all(trains.values())
        self._available = set(base.names()) if self.has_base else set()
        self._unchanged = {name for name in trains if not trains[name] and name in self._available}
        for name, parts in self._parts.items():
            abstract = isinstance(parts[0][0].get_value(), jax.ShapeDtypeStruct)
            if name in self._unchanged or (abstract and not trains[name]):
                check_tensor(base, self._available, name, hf_shape(parts[0][0]))
        self._replaced = {
            name
            for _, weight, lora in adaptable(model)
            if lora is not None and owns_kernel(lora)
            for name in hf_names(weight)
        }
        self._sources, self.copied = _sources(model, base, self._parts, self._unchanged, merge)
        self._dtype = config_dtype({"dtype": dtype} if dtype else base.config)
        self._own_dtypes = dtype is None

    def release(self) -> None:
        """Gives up the model's copies of weights that are read from the base."""
        for name, parts in self._parts.items():
            for variable, _ in parts if name in self._unchanged - self._replaced else ():
                value = variable.get_value()
                variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype))

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return hf_shape(self._parts[name][0][0])

    def dtype(self, name: str) -> np.dtype:
        own = self._own_dtypes and name in self._available
        return self._base.dtype(name) if own else self._dtype

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._sources[name]())

    def stored(self, name: str, form: Form) -> Quantized | None:
        return self._base.stored(name, form) if name in self.copied else None


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
    Tensors of the base that are not part of the model are copied.

    Returns a comment on trained weights that were rounded to the dtype of the base, or an empty
    text.

    Raises:
      ConfigError: a weight is not finite in the dtype that is written.
    """
    tokenizer = base.tokenizer()  # first: a base without one fails before the long write
    merged = MergedBase(model, base, merge=merge, dtype=dtype)
    layout = {name: (merged.dtype(name), merged.shape(name)) for name in merged.names()}
    others = set(other_tensors(model, base) if merged.has_base else ())
    layout |= {name: (base.dtype(name), base.shape(name)) for name in others}

    def value(name: str) -> np.ndarray:
        if name in others:
            return base.read(name)
        return finite_value(merged, name, copied=name in merged.copied)

    safetensors.write_sharded(folder, layout, value, max_shard_bytes=max_shard_bytes)
    write_files(base, folder, model.spec, tokenizer, dtype=dtype, chat_template=chat_template)
    trained = {merged.dtype(name) for name in layout.keys() - merged.copied - others}
    narrow = {str(dtype) for dtype in trained if dtype.itemsize < 4}
    if dtype or not narrow:
        return ""
    return (
        f"\n# Trained weights are rounded to {' and '.join(sorted(narrow))}, the type of the base: "
        "--dtype=float32 writes all weights in float32."
    )


def finite_value(base: Base, name: str, *, copied: bool = False) -> np.ndarray:
    """A tensor in the dtype that is written. copied: it may be any value, if its dtype stays.

    Raises:
      ConfigError: a value is not finite in that dtype.
    """
    read, dtype = base.read(name), base.dtype(name)
    with np.errstate(over="ignore"):  # reported below
        written = read.astype(dtype)
    if (not copied or read.dtype != written.dtype) and not np.isfinite(written).all():
        advice = "export an earlier --step"
        if np.isfinite(read).all():
            advice = "use --dtype=bfloat16"
        raise ConfigError(f"tensor {name!r} is not finite in {dtype}: {advice}")
    return written


def _sources(
    model: Decoder, base: Base, parts_of_tensors: dict, unchanged: set[str], merge: bool
) -> tuple[dict[str, Callable[[], np.ndarray]], set[str]]:
    """How to compute each tensor of the model by HF name, and the names of those that are copied
    from the base.

    unchanged: names that the base has and the run did not train.
    """
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
    for name, parts in parts_of_tensors.items():
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
    return sources, copied


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
