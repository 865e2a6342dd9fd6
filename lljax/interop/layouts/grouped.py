"""Formats with scales per group of inputs: GPTQ, AWQ, compressed-tensors and FP8 in blocks."""

import abc
from typing import Any

import ml_dtypes
import numpy as np

from lljax.errors import ModelError
from lljax.interop.layouts.kernel import FLOATS, Kernel, Shape
from lljax.interop.layouts.packing import quantized_of_groups, unpack
from lljax.models.quantize import Form, Quantized, dequantize
from lljax.parallel.rounding import cdiv

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the order of eight outputs in AWQ's nibbles
# Codes [in, out], scales [groups, out] and zeros [groups, out] or None.
Groups = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class Grouped(abc.ABC):
    """A format whose `groups` reads codes, scales and zeros."""

    end = ".weight"
    form: Form

    @abc.abstractmethod
    def groups(self, kernel: Kernel) -> Groups: ...

    def dense(self, kernel: Kernel) -> np.ndarray:
        """float32 [out, in]."""
        value = quantized_of_groups(*self.groups(kernel), self.form)
        return np.asarray(dequantize(value, np.float32)).T

    def stored(self, kernel: Kernel, form: Form) -> Quantized | None:
        return quantized_of_groups(*self.groups(kernel), form) if form == self.form else None


class Gptq(Grouped):
    """qweight int32 [in / n, out] packed along in, qzeros [groups, out / n] along out, n = 32 /
    bits; version 1 stores zero - 1. Frantar et al. 2022, arXiv 2210.17323; AutoGPTQ.
    """

    marks = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, c: dict):
        bits, self.group = c.get("bits"), c.get("group_size", 128)
        if bits not in (4, 8):
            raise ModelError(f"config.json: GPTQ of {bits!r} bits is not supported; 4 and 8 are")
        self.bits = int(bits)
        if c.get("desc_act"):
            raise ModelError(
                "config.json: GPTQ with desc_act (act-order) is not supported: quantize with "
                "desc_act=false"
            )
        version = c.get("checkpoint_format", "gptq")
        alike = all(str(rule).startswith("-:") for rule in c.get("dynamic") or {})  # left dense
        if version not in ("gptq", "gptq_v2") or not alike:
            raise ModelError(
                f"config.json: GPTQ with checkpoint_format={version!r} and "
                f"dynamic={c.get('dynamic')!r} is not supported; gptq and gptq_v2, alike in all "
                "quantized modules, are"
            )
        self.shift = 1 if version == "gptq" else 0
        self.form = Form(f"int{self.bits}", _block(self.group), zero=True)

    def shape(self, kernel: Kernel) -> Shape:
        packed, out = kernel.matrix_shape(".qweight")
        return out, packed * 32 // self.bits

    def groups(self, kernel: Kernel) -> Groups:
        out, rows = self.shape(kernel)
        per_word, group = 32 // self.bits, rows if self.group == -1 else self.group
        count = cdiv(rows, group)
        if kernel.has(".g_idx") and not np.array_equal(
            kernel.read(".g_idx", (rows,), np.int32), np.arange(rows) // group
        ):
            kernel.refuse("its g_idx is out of order (act-order), which is not supported")
        words = kernel.read(".qweight", (rows // per_word, out), np.int32)
        zeros = kernel.read(".qzeros", (count, out // per_word), np.int32)
        return (
            unpack(words.T, self.bits).T,
            kernel.read(".scales", (count, out), *FLOATS),
            unpack(zeros, self.bits).astype(np.int16) + self.shift,
        )


class Awq(Grouped):
    """qweight int32 [in, out / 8] and qzeros [groups, out / 8], packed along out in AWQ_ORDER.

    Lin et al. 2023, arXiv 2306.00978; AutoAWQ `WQLinear_GEMM`.
    """

    marks = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales")

    def __init__(self, c: dict):
        bits, version = c.get("bits"), str(c.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(
                f"config.json: AWQ of {bits!r} bits, version {version!r} is not supported; 4 bits, "
                "'gemm' are"
            )
        self.group = c.get("group_size", 128)
        self.form = Form("int4", _block(self.group), zero=True)

    def shape(self, kernel: Kernel) -> Shape:
        rows, packed = kernel.matrix_shape(".qweight")
        return packed * 8, rows

    def groups(self, kernel: Kernel) -> Groups:
        out, rows = self.shape(kernel)
        count = cdiv(rows, rows if self.group == -1 else self.group)

        def codes(part: str, lines: int) -> np.ndarray:
            words = kernel.read(part, (lines, out // 8), np.int32)
            return unpack(words, 4).reshape(lines, -1, 8)[..., AWQ_ORDER].reshape(lines, out)

        scales = kernel.read(".scales", (count, out), *FLOATS)
        return codes(".qweight", rows), scales, codes(".qzeros", count)


class CompressedTensors(Grouped):
    """pack-quantized: weight_packed int32 [out, in / n] along in, of code + half the range, and
    weight_zero_point, unless symmetric, [out / n, groups] along out. float-quantized: weight e4m3
    [out, in]. weight_scale [out, groups].
    """

    def __init__(self, c: dict):
        w = self._scheme(c)
        kind, bits, format = w.get("type"), w.get("num_bits"), c.get("format")
        strategy, block = w.get("strategy"), w.get("block_structure") or (1, 1)
        self.group = w.get("group_size") or -1
        integers = (kind, format) == ("int", "pack-quantized") and bits in (4, 8)
        floats = (kind, bits) == ("float", 8) and format in ("float-quantized", "naive-quantized")
        if integers and strategy in ("group", "channel"):
            self.form = Form(f"int{bits}", _block(self.group), zero=not w.get("symmetric", True))
            self.marks = (".weight_packed",)
            self.parts = (
                ".weight_packed",
                ".weight_scale",
                ".weight_zero_point",
                ".weight_shape",
                ".weight_g_idx",
            )
        elif floats and strategy in ("tensor", "channel", "block"):
            self.block = {"tensor": (0, 0), "channel": (1, 0), "block": tuple(block)}[strategy]
            self.form = Form("fp8", self.block[1] or 128)
            self.marks = (".weight_scale",)
            self.parts = (".weight", ".weight_scale", ".input_scale")
        else:
            raise ModelError(
                f"config.json: compressed-tensors of format {format!r}, {bits!r} bits of type "
                f"{kind!r}, strategy {strategy!r} is not supported; pack-quantized int4 and int8 "
                "and float-quantized fp8 are"
            )
        if w.get("actorder") in ("group", "dynamic", True):
            raise ModelError(
                "config.json: compressed-tensors with actorder='group' (act-order) is not "
                "supported: quantize with actorder='weight' or without"
            )

    @staticmethod
    def _scheme(c: dict) -> dict[str, Any]:
        """The scheme of all weights.

        Raises:
          ModelError: there is none, or there are several.
        """
        groups = list((c.get("config_groups") or {}).values())
        w = groups[0].get("weights") if groups and isinstance(groups[0], dict) else None
        if not isinstance(w, dict) or any(group.get("weights") != w for group in groups):
            raise ModelError(
                "config.json: compressed-tensors with one scheme for all weights is supported; "
                f"config_groups has {len(groups)}"
            )
        return w

    def shape(self, kernel: Kernel) -> Shape:
        if self.form.format == "fp8":
            return kernel.matrix_shape(".weight")
        shape = kernel.read(".weight_shape", (2,), np.int64, np.int32)
        return tuple(int(n) for n in shape)

    def groups(self, kernel: Kernel) -> Groups:
        if self.form.format == "fp8":
            return _fp8_groups(kernel, self.block, ".weight_scale")
        out, rows = self.shape(kernel)
        bits, per_word = self.form.bits, 32 // self.form.bits
        count = cdiv(rows, rows if self.group == -1 else self.group)
        if kernel.has(".weight_g_idx"):
            kernel.refuse("it has a weight_g_idx (act-order), which is not supported")
        words = kernel.read(".weight_packed", (out, cdiv(rows, per_word)), np.int32)
        zeros = None
        if self.form.zero:
            packed = kernel.read(".weight_zero_point", (cdiv(out, per_word), count), np.int32)
            zeros = unpack(packed.T, bits)[:, :out]
        scales = kernel.read(".weight_scale", (out, count), *FLOATS).T
        return unpack(words, bits)[:, :rows].T, scales, zeros


class Fp8(Grouped):
    """weight e4m3 [out, in] and its factors weight_scale_inv [out / 128, in / 128].

    DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """

    marks = (".weight_scale_inv",)
    parts = (".weight", ".weight_scale_inv")

    def __init__(self, c: dict):
        self.block: Any = c.get("weight_block_size")
        sound = (
            isinstance(self.block, (list, tuple))
            and len(self.block) == 2
            and all(isinstance(n, int) and n > 0 for n in self.block)
        )
        if c.get("fmt", "e4m3") != "e4m3" or not sound:
            raise ModelError(
                f"config.json: fp8 with fmt={c.get('fmt')!r} and weight_block_size={self.block!r} "
                "is not supported; e4m3 in blocks such as [128, 128] is"
            )
        self.form = Form("fp8", self.block[1])

    def shape(self, kernel: Kernel) -> Shape:
        return kernel.matrix_shape(".weight")

    def groups(self, kernel: Kernel) -> Groups:
        return _fp8_groups(kernel, self.block, ".weight_scale_inv")


def _fp8_groups(kernel: Kernel, block: Any, scale: str) -> Groups:
    """Codes and scales of e4m3 in blocks (outputs, inputs); 0 for all outputs or inputs."""
    out, rows = kernel.matrix_shape(".weight")
    tall, wide = block[0] or out, block[1] or rows
    scales = kernel.read(scale, (cdiv(out, tall), cdiv(rows, wide)), *FLOATS).astype(np.float32)
    codes = kernel.read(".weight", (out, rows), ml_dtypes.float8_e4m3fn)
    return codes.T, np.repeat(scales, tall, axis=0)[:out].T, None


def _block(group: Any) -> int:
    """The block of a form for groups of this many inputs, -1 for all.

    Raises:
      ModelError: group_size is no even number and not -1.
    """
    if not isinstance(group, int) or group == 0 or group < -1 or group % 2 and group > 0:
        raise ModelError(
            f"config.json: group_size={group!r} in quantization_config; an even number or -1 is "
            "needed"
        )
    return 128 if group == -1 else group
