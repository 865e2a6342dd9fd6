"""A model as a GGUF file for llama.cpp, Ollama and LM Studio, written tensor by tensor.

The inverse of lljax.interop.gguf, which reads every file before its weights are written: a model
that llama.cpp would compute in another way is refused.
"""

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Form
from gguf import LlamaFileType

from lljax.errors import ConfigError, ModelError, short
from lljax.interop.base import Base
from lljax.interop.gguf import GgufBase
from lljax.interop.gguf_layout import ROUTERS, Layout, gguf_places
from lljax.interop.gguf_rope import RopeEntries, write_rope
from lljax.interop.gguf_tokenizer_write import Entry, entry, tokenizer_metadata
from lljax.interop.huggingface import HARMLESS, hf_shape, parts_of
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, rope_to_hf, spec_from_hf
from lljax.models.families.family import GgufFormat, SplitTensor
from lljax.models.rope import KINDS, RopeSpec, frequencies
from lljax.models.spec import DecoderSpec

# Names of types: the type of matrices, and the name of the whole file.
TYPES = {
    "f32": (Form.F32, LlamaFileType.ALL_F32),
    "f16": (Form.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Form.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Form.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Form.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Form.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Form.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Form.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
WIDE = (Form.F32, Form.BF16)  # types that hold the largest float32; others have float16 in them
GATING = {
    "softmax": gguf.ExpertGatingFuncType.SOFTMAX,
    "sigmoid": gguf.ExpertGatingFuncType.SIGMOID,
}
LARGEST = float(np.finfo(np.float16).max)
HEAD = "lm_head.weight"
# Fields of DecoderSpec that a file names otherwise, see `_check_read_back`.
COMPARED_APART = ("family", "rope", "more_ropes", "layers", "attention_scale")


class Tensor(NamedTuple):
    """A tensor of the file. sources: read its parts, one after the other along the first axis, in
    the layout of GGUF; their values may be of any floating-point type.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    sources: tuple[Callable[[], np.ndarray], ...]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of the array of bytes that holds it."""
        block, size = gguf.GGML_QUANT_SIZES[self.form]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def write_gguf(
    base: Base,
    spec: DecoderSpec,
    file: Path,
    *,
    type: str,
    chat_template: str | None = None,
) -> None:
    """Writes the weights of `base` as a model with this `spec`, whose RoPE and length may be
    stretched, to a GGUF file.

    type: a name of TYPES, for every matrix, embedding and head included (as `llama-quantize --pure`
    and convert_hf_to_gguf.py have it); norms and biases are f32. A matrix whose rows 32 does not
    divide is written in f16 in place of a quantized type, and a log line counts them.
    chat_template: takes the place of the base's.

    One tensor of HF is in memory at a time. A failure leaves an incomplete file.

    Raises:
      ConfigError: an unknown type; llama.cpp has no such model, RoPE or tokenizer; a value is not
        finite, or too large for the type.
      ModelError: a tensor is missing or has another shape.
    """
    if type not in TYPES:
        raise ConfigError(
            f"--dtype={type} is none of {', '.join(TYPES)}, the types of --format=gguf"
        )
    form, file_type = TYPES[type]
    format = gguf_format(spec)
    rope = write_rope(spec.rope, spec.rotary(), format.rope_kinds, format.yarn_log_multiplier)
    metadata = {
        "general.type": entry("model"),
        "general.name": entry(Path(base.path).name.removesuffix(".gguf")),
        "general.file_type": entry(int(file_type)),
        "general.quantization_version": entry(gguf.GGML_QUANT_VERSION),
    }
    values = _model_metadata(spec, format, rope)
    metadata |= {f"{format.architecture}.{key}": entry(value) for key, value in values.items()}
    metadata |= tokenizer_metadata(base, spec.V, chat_template)
    tensors = [
        Tensor(name, array.shape, Form.F32, (lambda array=array: array,))
        for name, array in rope.tensors.items()
    ]
    tensors += _weights(base, spec, Layout(format, spec.N, spec.K), form)
    write_file(
        file,
        format,
        metadata,
        tensors,
        check=lambda: _check_read_back(file, spec),
        checked=len(rope.tensors),
    )


def gguf_format(spec: DecoderSpec) -> GgufFormat:
    """The family of a spec in GGUF files.

    Raises:
      ConfigError: it is not written.
    """
    format = FAMILIES[spec.family].gguf
    if format is None:
        written = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
        raise ConfigError(
            f"--format=gguf: models of the family {spec.family} are not written (of {written} they "
            "are): use --format=merged, and llama.cpp's convert_hf_to_gguf.py"
        )
    return format


def _model_metadata(spec: DecoderSpec, format: GgufFormat, rope: RopeEntries) -> dict[str, Any]:
    values = {
        "vocab_size": spec.V,
        "context_length": spec.max_length,
        "embedding_length": spec.D,
        "block_count": spec.L,
        "feed_forward_length": spec.F,
        "attention.head_count": spec.N,
        "attention.head_count_kv": spec.K,
        "attention.key_length": spec.H,
        "attention.value_length": spec.H,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": int(spec.H * spec.rope.partial),
        "rope.freq_base": float(spec.rope.theta),
    }
    values |= {f"rope.scaling.{key}": value for key, value in rope.metadata.items()}
    original = rope_to_hf(spec)["max_position_embeddings"]
    if KINDS[spec.rope.type].vllm_multiplies and original != spec.max_length:
        values["rope.scaling.original_context_length"] = original  # for our reader alone
    return values | _experts(spec) | format.metadata(spec)


def _experts(spec: DecoderSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {}
    values = {
        "expert_count": moe.E,
        "expert_used_count": moe.k,
        "expert_feed_forward_length": moe.F,
        "expert_gating_func": int(GATING[moe.score]),
        "expert_weights_norm": moe.normalize,
        "expert_weights_scale": float(moe.scale),
        "leading_dense_block_count": sum(
            1 for _ in itertools.takewhile(lambda layer: not layer.moe, spec.layers)
        ),
    }
    if moe.shared:
        values["expert_shared_count"] = moe.shared // moe.F
        values["expert_shared_feed_forward_length"] = moe.shared
    if moe.groups > 1:
        values["expert_group_count"] = moe.groups
        values["expert_group_used_count"] = moe.best_groups
    return values


def _weights(base: Base, spec: DecoderSpec, layout: Layout, form: Form) -> list[Tensor]:
    """The tensors of the base that are part of the model.

    Raises:
      ModelError: a tensor is missing or has another shape.
      ConfigError: GGUF files of the family have no such tensor.
    """
    available, narrow = set(base.names()), []
    tensors: dict[str, Tensor] = {}
    shapes = {name: hf_shape(of[0][0]) for name, of in parts_of(Decoder(spec)).items()}
    for name, shape in shapes.items():
        places = gguf_places(name, layout.format)
        if not places:
            raise ConfigError(
                f"--format=gguf: llama.cpp's {layout.format.architecture} has no tensor {name!r}: "
                "use --format=merged"
            )
        if name not in available:
            raise ModelError(f"{base.path}: tensor {name!r} is missing")
        if base.shape(name) != shape:
            raise ModelError(
                f"{base.path}: tensor {name!r} has shape {base.shape(name)}, and config.json makes "
                f"it {shape}"
            )
        split = layout.splits(name)
        zeros = np.broadcast_to(np.float32(0), shape)
        parts = (
            split.split(zeros, spec) if split else (zeros.reshape(layout.gguf_shape(name, shape)),)
        )
        for i, (place, part) in enumerate(zip(places, parts, strict=True)):

            def source(
                name: str = name, i: int = i, split: SplitTensor | None = split
            ) -> np.ndarray:
                array = base.read(name)
                return split.split(array, spec)[i] if split else layout.to_gguf(name, array)

            stored, sources = part.shape, (source,)
            own = Form.F32 if part.ndim == 1 or place.name.split(".")[-2] in ROUTERS else form
            if stored[-1] % gguf.GGML_QUANT_SIZES[own][0]:
                own = Form.F16
                narrow.append(name)
            if place.expert is not None:  # in the order of `hf_names`, expert after expert
                before = tensors[place.name].sources if place.name in tensors else ()
                sources = (*before, source)
                stored = (len(sources), *stored)
            tensors[place.name] = Tensor(place.name, stored, own, sources)
    if narrow:
        logging.warning(
            "%d tensors have rows that 32 does not divide and are written in f16, such as %s of "
            "shape %s",
            len(narrow),
            narrow[0],
            shapes[narrow[0]],
        )
    others = {name for name in available - set(shapes) if not name.endswith(HARMLESS)} - {HEAD}
    if others:
        logging.warning(
            "%s: %d tensors are not part of the model and are not written, such as %s",
            base.path,
            len(others),
            min(others),
        )
    return list(tensors.values())


# ---------------------------------------------------------------- the file
def write_file(
    file: Path,
    format: GgufFormat,
    metadata: dict[str, Entry],
    tensors: list[Tensor],
    check: Callable[[], None] | None = None,
    checked: int = 0,
) -> None:
    """Writes a GGUF file; check: runs after the first `checked` tensors, when the values of the
    others are still zeros.

    Raises:
      ConfigError: see `encoded`.
    """
    writer = gguf.GGUFWriter(file, format.architecture)
    for key, (value, type, item) in metadata.items():
        writer.add_key_value(key, value, type, item)
    for tensor in tensors:
        shape, size = tensor.bytes_shape, math.prod(tensor.bytes_shape)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, tensor.form)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = file.stat().st_size
        for tensor in tensors[:checked]:
            writer.write_tensor_data(encoded(tensor))
        if check:
            assert writer.fout is not None
            writer.fout[0].flush()
            sizes = [start, *(math.prod(tensor.bytes_shape) for tensor in tensors)]
            pad = gguf.GGUFWriter.ggml_pad
            os.truncate(file, sum(pad(size, writer.data_alignment) for size in sizes))
            check()
        for tensor in tensors[checked:]:
            writer.write_tensor_data(encoded(tensor))
    finally:
        writer.close()


def encoded(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8 `tensor.bytes_shape`.

    Raises:
      ConfigError: a value is not finite, or too large for the type.
    """
    stored = np.empty(tensor.bytes_shape, np.uint8)
    for part, source in zip(stored.reshape(len(tensor.sources), -1), tensor.sources, strict=True):
        part[:] = _encoded_part(tensor, source)
    return stored


def _encoded_part(tensor: Tensor, source: Callable[[], np.ndarray]) -> np.ndarray:
    values = np.ascontiguousarray(source(), np.float32)
    largest = np.abs(values).max(initial=0)
    if not np.isfinite(largest):
        raise ConfigError(
            f"tensor {tensor.name!r} holds values that are not finite: export an earlier --step"
        )
    if largest > LARGEST and tensor.form not in WIDE:
        raise ConfigError(
            f"tensor {tensor.name!r} has a value of {largest:.3g}, too large for "
            f"{tensor.form.name.lower()}: use --dtype=bf16"
        )
    return gguf.quants.quantize(values, tensor.form).view(np.uint8).reshape(-1)


# ---------------------------------------------------------------- the check
def _check_read_back(file: Path, spec: DecoderSpec) -> None:
    """Refuses a file that is not read, or as another model than `spec`.

    Raises:
      ConfigError: it is.
    """
    try:
        read = spec_from_hf(GgufBase(file.name, file).config)
    except ModelError as error:
        raise ConfigError(
            f"--format=gguf: llama.cpp has no such model ({error}): use --format=merged"
        ) from None
    names = [field.name for field in dataclasses.fields(spec) if field.name not in COMPARED_APART]
    pairs = {name: (getattr(spec, name), getattr(read, name)) for name in [*names, "scale"]}
    pairs |= {
        f"layer {i}": (_layer(ours, spec), _layer(theirs, spec))
        for i, (ours, theirs) in enumerate(zip(spec.layers, read.layers, strict=False))
    }
    differences = (found for name, both in pairs.items() for found in _differences(name, *both))
    for name, ours, theirs in differences:
        raise ConfigError(
            f"--format=gguf: llama.cpp would read this model with {name} {short(theirs)} in place "
            f"of {short(ours)}: use --format=merged"
        )
    for i, (ours, theirs) in enumerate(zip(spec.ropes, read.ropes, strict=True)):
        if not _same_rotation(ours, theirs, spec.rotary(i), spec.max_length):
            raise ConfigError(
                f"--format=gguf: llama.cpp has no RoPE of the kind {ours.type!r} with these values "
                f"({short(ours)}): use --format=merged"
            )


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, ours, theirs) of the values, or of their fields, that differ by more than the rounding
    to float32 in the metadata.
    """
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            both = (getattr(of, field.name) for of in (ours, theirs))
            yield from _differences(f"{name} {field.name}", *both)
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            yield name, ours, theirs
    elif ours != theirs:
        yield name, ours, theirs


def _layer(layer: Any, spec: DecoderSpec) -> Any:
    """A layer, without a window that no row reaches."""
    if layer.window is not None and layer.window >= spec.max_length:
        return dataclasses.replace(layer, window=None)
    return layer


def _same_rotation(ours: RopeSpec, theirs: RopeSpec, H: int, max_length: int) -> bool:
    """Whether two RoPE rotate short and long rows alike, up to float32 in the metadata."""
    return ours.type == theirs.type and all(
        np.allclose(a, b, rtol=1e-5, atol=0)
        for length in (1, max_length)
        for a, b in zip(frequencies(ours, H, length), frequencies(theirs, H, length), strict=True)
    )
