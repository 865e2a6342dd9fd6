"""Writers of quantized kernels: a class for each format, in the table `WRITERS`."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lljax.interop.layouts.grouped import AWQ_ORDER
from lljax.interop.layouts.packing import pack_words

GROUPS = (-1, 32, 64, 128)  # of vLLM's kernels: marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES
EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How kernels are quantized.

    bits: 4 or 8. kind: "int", or "float" for e4m3 with a scale for each output and activations in
    e4m3 with a scale for each token. group: inputs that share a scale, -1 for all. symmetric:
    whether the zero point of every group is the middle code.
    """

    bits: int
    kind: str = "int"
    group: int = 128
    symmetric: bool = True

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized kernel in HF orientation, numpy.

    codes: uint8 [out, in], the integer plus `Scheme.middle`; or float8_e4m3fn [out, in]. scale:
    [out, groups], in the dtype `LayoutWriter.scale_dtype`. zero: uint8 [out, groups], or None in
    a symmetric scheme. The kernel is (codes - zero) * scale.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None


class LayoutWriter(Protocol):
    """A format of kernels that can be written."""

    def refuses(self, scheme: Scheme) -> str:
        """Why the format cannot hold the scheme, and what to use; "" if it can."""
        ...

    def refuses_shape(self, out: int, rows: int, scheme: Scheme) -> str:
        """Why the format cannot hold a kernel [out, rows]; "" if it can."""
        ...

    def scale_dtype(self, model_dtype: Any) -> np.dtype:
        """The dtype of scales in the file."""
        ...

    def tensors(self, kernel: Codes, scheme: Scheme) -> dict[str, np.ndarray]:
        """The tensors of a kernel by the end of their name, after the module's. C-contiguous.

        Raises:
          ValueError: codes, scales and zeros are not in the shapes and types of the scheme.
        """
        ...

    def config(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, Any]:
        """config.json's quantization_config.

        quantized: the modules with quantized kernels. dense: every other linear module, a tied
        head and the routers of experts among them. Module names are HF's: "lm_head",
        "model.layers.0.self_attn.q_proj".
        """
        ...

    def files(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Other JSON files of the folder, by name."""
        ...


class CompressedTensorsWriter:
    """pack-quantized and float-quantized; see `CompressedTensors`, which reads them."""

    def refuses(self, scheme: Scheme) -> str:
        if scheme.kind == "float":
            return _refuses_float(scheme)
        if not scheme.symmetric:
            return (
                "transformers does not load compressed-tensors with zero points: use a symmetric "
                "scheme, or layout awq"
            )
        return _refuses_integers(scheme)

    def refuses_shape(self, out: int, rows: int, scheme: Scheme) -> str:
        return _refuses_rows(rows, scheme)

    def scale_dtype(self, model_dtype: Any) -> np.dtype:
        return np.dtype(model_dtype)

    def tensors(self, kernel: Codes, scheme: Scheme) -> dict[str, np.ndarray]:
        _check(kernel, scheme)
        scale = np.ascontiguousarray(kernel.scale)
        if scheme.kind == "float":
            return {".weight": np.ascontiguousarray(kernel.codes), ".weight_scale": scale}
        return {
            ".weight_packed": pack_words(kernel.codes, scheme.bits),
            ".weight_scale": scale,
            ".weight_shape": np.array(kernel.codes.shape, np.int64),
        }

    def config(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, Any]:
        weights = {
            "num_bits": scheme.bits,
            "type": scheme.kind,
            "symmetric": True,
            "strategy": "channel" if scheme.group == -1 else "group",
            "group_size": None if scheme.group == -1 else scheme.group,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
        }
        inputs = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
        }
        format = "float-quantized" if scheme.kind == "float" else "pack-quantized"
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs if scheme.kind == "float" else None,
                    "output_activations": None,
                    "format": format,
                }
            },
            "ignore": list(dense),
            "kv_cache_scheme": None,
        }

    def files(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        return {}


class GptqWriter:
    """Version 1 (zeros are stored less one), groups in order; see `Gptq`, which reads it."""

    def refuses(self, scheme: Scheme) -> str:
        if scheme.kind == "float":
            return "gptq holds integers: use layout compressed-tensors for fp8"
        if not scheme.symmetric:
            return "vLLM refuses gptq with zero points: use a symmetric scheme, or layout awq"
        return _refuses_integers(scheme)

    def refuses_shape(self, out: int, rows: int, scheme: Scheme) -> str:
        return _refuses_rows(rows, scheme) or _refuses_words(out, rows, scheme)

    def scale_dtype(self, model_dtype: Any) -> np.dtype:
        return np.dtype(np.float16)

    def tensors(self, kernel: Codes, scheme: Scheme) -> dict[str, np.ndarray]:
        _check(kernel, scheme)
        rows = kernel.codes.shape[1]
        zeros = np.full(kernel.scale.T.shape, scheme.middle - 1, np.uint8)
        return {
            ".qweight": np.ascontiguousarray(pack_words(kernel.codes, scheme.bits).T),
            ".qzeros": pack_words(zeros, scheme.bits),
            ".scales": np.ascontiguousarray(kernel.scale.T),
            ".g_idx": (np.arange(rows) // _group(scheme, rows)).astype(np.int32),
        }

    def config(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, Any]:
        """`dynamic` names dense modules to vLLM and GPTQModel, `modules_in_block_to_quantize` the
        quantized ones to optimum, by the ends of their names.
        """
        quantized, dense = list(quantized), list(dense)
        config = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "true_sequential": True,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "dynamic": {rf"-:^{re.escape(name)}$": {} for name in _with_experts(dense)},
        }
        ends = sorted({_end(name) for name in quantized})
        if {_end(name) for name in dense} - {"lm_head"}:
            config["modules_in_block_to_quantize"] = [ends]
        return config

    def files(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": self.config(scheme, quantized, dense)}


class AwqWriter:
    """Version gemm, with zero points; see `Awq`, which reads it."""

    def refuses(self, scheme: Scheme) -> str:
        if scheme.kind == "float" or scheme.bits != 4:
            return "awq holds integers of 4 bits: use layout compressed-tensors for other kinds"
        return _refuses_integers(scheme)

    def refuses_shape(self, out: int, rows: int, scheme: Scheme) -> str:
        return _refuses_rows(rows, scheme) or _refuses_words(out, rows, scheme)

    def scale_dtype(self, model_dtype: Any) -> np.dtype:
        return np.dtype(np.float16)

    def tensors(self, kernel: Codes, scheme: Scheme) -> dict[str, np.ndarray]:
        _check(kernel, scheme)
        zero = kernel.zero
        if zero is None:
            zero = np.full(kernel.scale.shape, scheme.middle, np.uint8)

        def words(x: np.ndarray) -> np.ndarray:
            """int32 [lines, out / 8] of [out, lines]."""
            nibbles = np.empty_like(x.T).reshape(x.shape[1], -1, 8)
            nibbles[..., AWQ_ORDER] = x.T.reshape(nibbles.shape)
            return pack_words(nibbles.reshape(x.shape[1], -1), 4)

        return {
            ".qweight": words(kernel.codes),
            ".qzeros": words(zero),
            ".scales": np.ascontiguousarray(kernel.scale.T),
        }

    def config(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": _with_experts(dense),
        }

    def files(
        self, scheme: Scheme, quantized: Iterable[str], dense: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        return {}


WRITERS: dict[str, LayoutWriter] = {
    "compressed-tensors": CompressedTensorsWriter(),
    "gptq": GptqWriter(),
    "awq": AwqWriter(),
}


def _group(scheme: Scheme, rows: int) -> int:
    return rows if scheme.group == -1 else scheme.group


def _check(kernel: Codes, scheme: Scheme) -> None:
    out, rows = kernel.codes.shape
    wanted = (out, rows // _group(scheme, rows))
    codes = np.uint8 if scheme.kind == "int" else ml_dtypes.float8_e4m3fn
    zero = None if scheme.symmetric else wanted
    shapes = kernel.scale.shape, None if kernel.zero is None else kernel.zero.shape
    if kernel.codes.dtype != codes or shapes != (wanted, zero):
        raise ValueError(
            f"codes {kernel.codes.dtype} {[out, rows]} with scales and zeros of shapes {shapes}; "
            f"{scheme} needs {np.dtype(codes)} and {(wanted, zero)}"
        )
    if scheme.kind == "int" and kernel.codes.max(initial=0) >= 2 * scheme.middle:
        raise ValueError(f"a code of {kernel.codes.max()} in {scheme.bits} bits")


def _refuses_float(scheme: Scheme) -> str:
    if scheme.bits != 8 or scheme.group != -1 or not scheme.symmetric:
        return "fp8 has 8 bits and one scale for each output: use bits 8, group -1, symmetric"
    return ""


def _refuses_integers(scheme: Scheme) -> str:
    if scheme.bits not in (4, 8):
        return f"integers of {scheme.bits} bits are not supported: use 4 or 8"
    if scheme.group not in GROUPS:
        return (
            f"vLLM has no kernels for groups of {scheme.group} inputs: use 32, 64 or 128, or -1 "
            "for one scale for each output"
        )
    return ""


def _refuses_rows(rows: int, scheme: Scheme) -> str:
    if rows % _group(scheme, rows):
        return f"its {rows} inputs are no multiple of the group of {scheme.group}"
    return ""


def _refuses_words(out: int, rows: int, scheme: Scheme) -> str:
    per_word = 32 // scheme.bits
    if out % per_word or rows % per_word:
        return f"its {out} outputs and {rows} inputs are not both multiples of {per_word}"
    return ""


def _with_experts(dense: Iterable[str]) -> list[str]:
    """The modules, and vLLM's name for all experts of a layer together."""
    names: dict[str, None] = {}
    for name in dense:
        names[name] = None
        if expert := EXPERT.fullmatch(name):
            names[expert[1]] = None
    return list(names)


def _end(name: str) -> str:
    """The end of a module's name that is alike in all layers: "self_attn.q_proj"; of experts, whose
    number is in the middle, "up_proj".
    """
    return re.sub(r".*\.layers\.\d+\.(.*\.experts\.\d+\.)?", "", name)
