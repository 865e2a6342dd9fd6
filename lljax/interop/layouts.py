"""How published checkpoints store quantized kernels: one class per format, in the table
`LAYOUTS`.
"""

import json
import math

import ml_dtypes
import numpy as np

from lljax.errors import ModelError
from lljax.interop.folder import FolderBase
from lljax.models.quantize import DYNAMIC, FORMS, NF4, OUTER, Form, Quantised, dequantise, pack

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in its eight nibbles AWQ puts an output


def form_of(quantise: str, hf_config: dict) -> Form | None:
    """The form of the kernels of a run whose `model.quantize` is `quantise`: that of the base on
    disk, where it has the format; None for dense ones.

    Raises:
      ModelError: config.json's quantization_config is of a kind that is not supported.
    """
    layout = layout_of(hf_config)
    if quantise == "none":
        return None
    return (
        layout.form
        if layout and layout.form and layout.form.format == quantise
        else FORMS[quantise]
    )


def layout_of(hf_config: dict):
    """How config.json's quantization_config says that kernels are stored; None where there is
    none.
    """
    c = hf_config.get("quantization_config")
    if not c:
        return None
    method = c.get("quant_method") if isinstance(c, dict) else None
    if method not in LAYOUTS:
        raise ModelError(
            f"config.json: quantization_config.quant_method={method!r} is none of {', '.join(LAYOUTS)}: use the "
            "model that it was made from"
        )
    return LAYOUTS[method](c)


class Kernel:
    """The tensors on disk of one quantised kernel."""

    def __init__(self, base: FolderBase, stem: str):
        self.path, self.stem, self.tensors = base.path, base.prefix + stem, base.tensors

    def shape(self, part: str) -> tuple[int, ...]:
        self._find(part)
        return self.tensors.shape(self.stem + part)

    def has(self, part: str) -> bool:
        return self.stem + part in self.tensors.where

    def read(self, part: str, shape: tuple[int, ...], *types) -> np.ndarray:
        """The tensor, of this shape (as many values suffice) and one of these types."""
        self._find(part)
        name = self.stem + part
        found, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        if math.prod(found) != math.prod(shape) or dtype not in types:
            raise ModelError(
                f"{self.path}: tensor {name!r} is {dtype} {list(found)}, and its kernel needs "
                f"{' or '.join(str(np.dtype(t)) for t in types)} {list(shape)}"
            )
        return self.tensors.read(name).reshape(shape)

    def _find(self, part):
        if not self.has(part):
            raise ModelError(f"{self.path}: tensor {self.stem + part!r} is missing")

    def refuse(self, reason: str):
        raise ModelError(f"{self.path}: {self.stem}: {reason}")


FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


class BitsAndBytes:
    """NF4 of [out, in] flattened, two codes to a byte, the first in the high bits; scales of 64,
    which are in eight bits in turn where `nested`. bitsandbytes
    `QuantState.as_dict(packed=True)`.
    """

    STATE = ".weight.quant_state.bitsandbytes__nf4"
    end, marks = ".weight", (STATE,)
    parts = (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        STATE,
    )

    def __init__(self, c: dict):
        kind = c.get("bnb_4bit_quant_type", "fp4")
        if not c.get("load_in_4bit", c.get("_load_in_4bit")) or kind != "nf4":
            raise ModelError(
                "config.json: of bitsandbytes, load_in_4bit with bnb_4bit_quant_type 'nf4' is supported; this is "
                f"{'8 bits' if c.get('load_in_8bit') else repr(kind)}"
            )
        self.form = FORMS["nf4-double" if c.get("bnb_4bit_use_double_quant") else "nf4"]

    def _state(self, kernel) -> dict:
        try:
            state = json.loads(bytes(kernel.read(self.STATE, kernel.shape(self.STATE), np.uint8)))
            out, rows = state["shape"]
            block = int(state["blocksize"])
            if (
                out * rows % 2
                or block < 2
                or state["quant_type"] != "nf4"
                or state.get("nested_blocksize", OUTER) != OUTER
            ):
                raise ValueError("not NF4 of a matrix, with scales in blocks of 256")
        except (ValueError, KeyError, TypeError) as error:
            kernel.refuse(f"its quant_state cannot be read ({error})")
        return state | {"blocks": -(-out * rows // block)}

    def shape(self, kernel):
        return tuple(self._state(kernel)["shape"])

    def _codes(self, kernel, state) -> np.ndarray:
        """uint8 [out, in]."""
        if not np.array_equal(kernel.read(".weight.quant_map", (16,), np.float32), NF4):
            kernel.refuse("its quant_map is not that of NF4")
        packed = kernel.read(".weight", (math.prod(state["shape"]) // 2,), np.uint8)
        return np.stack([packed >> 4, packed & 15], axis=-1).reshape(state["shape"])

    def _nested(self, kernel, state):
        """(codes of the scales, their scales) where the scales are quantised."""
        return (
            kernel.read(".weight.absmax", (state["blocks"],), np.uint8),
            kernel.read(".weight.nested_absmax", (-(-state["blocks"] // OUTER),), np.float32),
        )

    def _scales(self, kernel, state) -> np.ndarray:
        """float32 [blocks]."""
        if not kernel.has(".weight.nested_absmax"):
            return kernel.read(".weight.absmax", (state["blocks"],), np.float32)
        codes, outer = self._nested(kernel, state)
        table = kernel.read(".weight.nested_quant_map", (256,), np.float32)
        return table[codes] * np.repeat(outer, OUTER)[: len(codes)] + np.float32(
            state["nested_offset"]
        )

    def dense(self, kernel):
        state = self._state(kernel)
        codes, scales = self._codes(kernel, state), self._scales(kernel, state)
        return (
            NF4[codes].reshape(-1) * np.repeat(scales, state["blocksize"])[: codes.size]
        ).reshape(codes.shape)

    def stored(self, kernel, form):
        state = self._state(kernel)
        (out, rows), block = state["shape"], state["blocksize"]
        if form.format not in ("nf4", "nf4-double") or form.block != block or rows % block:
            return None  # blocks that run over the end of a row have no place in ours
        if form.format == "nf4":
            return _of_groups(
                self._codes(kernel, state).T,
                self._scales(kernel, state).reshape(out, -1).T,
                None,
                form,
            )
        if not kernel.has(".weight.nested_absmax"):
            return None
        codes, outer = self._nested(kernel, state)
        if not np.allclose(
            kernel.read(".weight.nested_quant_map", (256,), np.float32), DYNAMIC, rtol=0, atol=1e-6
        ):
            kernel.refuse("its nested_quant_map is not bitsandbytes' dynamic map")
        return _of_groups(
            self._codes(kernel, state).T,
            codes.reshape(out, -1).T,
            None,
            form,
            outer=outer,
            offset=np.float32(state["nested_offset"]),
        )


class Grouped:
    """What GPTQ, AWQ and compressed-tensors have in common: `groups` reads integer codes [in, out],
    scales and zeros [groups, out].
    """

    end = ".weight"

    def dense(self, kernel):
        return _dense(self.stored(kernel, self.form))

    def stored(self, kernel, form):
        return _of_groups(*self.groups(kernel), form) if form == self.form else None


class Gptq(Grouped):
    """qweight int32 [in / n, out] packed along in, qzeros [groups, out / n] along out, of n = 32 /
    bits; version 1 stores zero - 1. Frantar et al. 2022, arXiv 2210.17323; AutoGPTQ.
    """

    marks = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, c: dict):
        self.bits, self.group = c.get("bits"), c.get("group_size", 128)
        if self.bits not in (4, 8):
            raise ModelError(
                f"config.json: GPTQ of {self.bits!r} bits is not supported; 4 and 8 are"
            )
        if c.get("desc_act"):
            raise ModelError(
                "config.json: GPTQ with desc_act (act-order) is not supported: quantise with desc_act=false"
            )
        version = c.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2") or c.get("dynamic"):
            raise ModelError(
                f"config.json: GPTQ with checkpoint_format={version!r} and dynamic={c.get('dynamic')!r} is not "
                "supported; gptq and gptq_v2, alike in all modules, are"
            )
        self.shift = 1 if version == "gptq" else 0
        self.form = Form(f"int{self.bits}", _block(self.group), zero=True)

    def shape(self, kernel):
        packed, out = _matrix(kernel, ".qweight")
        return out, packed * 32 // self.bits

    def groups(self, kernel):
        out, rows = self.shape(kernel)
        per, group = 32 // self.bits, rows if self.group == -1 else self.group
        count = -(-rows // group)
        if kernel.has(".g_idx") and not np.array_equal(
            kernel.read(".g_idx", (rows,), np.int32), np.arange(rows) // group
        ):
            kernel.refuse("its g_idx is out of order (act-order), which is not supported")
        codes = _unpacked(kernel.read(".qweight", (rows // per, out), np.int32).T, self.bits).T
        zeros = (
            _unpacked(kernel.read(".qzeros", (count, out // per), np.int32), self.bits).astype(
                np.int16
            )
            + self.shift
        )
        return codes, kernel.read(".scales", (count, out), *FLOATS), zeros


class Awq(Grouped):
    """qweight int32 [in, out / 8] and qzeros [groups, out / 8], packed along out in an order of its
    own. Lin et al. 2023, arXiv 2306.00978; AutoAWQ `WQLinear_GEMM`.
    """

    marks = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales")

    def __init__(self, c: dict):
        bits, version = c.get("bits"), str(c.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(
                f"config.json: AWQ of {bits!r} bits, version {version!r} is not supported; 4 bits, 'gemm' are"
            )
        self.group = c.get("group_size", 128)
        self.form = Form("int4", _block(self.group), zero=True)

    def shape(self, kernel):
        rows, packed = _matrix(kernel, ".qweight")
        return packed * 8, rows

    def groups(self, kernel):
        out, rows = self.shape(kernel)
        count = -(-rows // (rows if self.group == -1 else self.group))
        codes, zeros = (
            _unpacked(kernel.read(part, (lines, out // 8), np.int32), 4)
            .reshape(lines, -1, 8)[..., AWQ_ORDER]
            .reshape(lines, out)
            for part, lines in ((".qweight", rows), (".qzeros", count))
        )
        return codes, kernel.read(".scales", (count, out), *FLOATS), zeros


class CompressedTensors(Grouped):
    """pack-quantized: weight_packed int32 [out, in / n] along in, of code + half the range;
    weight_zero_point, where not symmetric, [out / n, groups] along out. float-quantized: weight
    e4m3 [out, in]. weight_scale [out, groups].
    """

    def __init__(self, c: dict):
        groups = list((c.get("config_groups") or {}).values())
        w = groups[0].get("weights") if groups and isinstance(groups[0], dict) else None
        if not isinstance(w, dict) or any(group.get("weights") != w for group in groups):
            raise ModelError(
                "config.json: compressed-tensors with one scheme for all weights is supported; config_groups "
                f"has {len(groups)}"
            )
        kind, bits, format = w.get("type"), w.get("num_bits"), c.get("format")
        strategy, block = w.get("strategy"), w.get("block_structure") or (1, 1)
        self.group = w.get("group_size") or -1
        if (
            (kind, format) == ("int", "pack-quantized")
            and bits in (4, 8)
            and strategy in ("group", "channel")
        ):
            self.form = Form(f"int{bits}", _block(self.group), zero=not w.get("symmetric", True))
            self.marks, self.parts = (
                (".weight_packed",),
                (
                    ".weight_packed",
                    ".weight_scale",
                    ".weight_zero_point",
                    ".weight_shape",
                    ".weight_g_idx",
                ),
            )
        elif (
            (kind, bits) == ("float", 8)
            and format in ("float-quantized", "naive-quantized")
            and strategy in ("tensor", "channel", "block")
        ):
            self.block = {"tensor": (0, 0), "channel": (1, 0), "block": tuple(block)}[strategy]
            self.form = Form("fp8", self.block[1] or 128)
            self.marks, self.parts = (
                (".weight_scale",),
                (".weight", ".weight_scale", ".input_scale"),
            )
        else:
            raise ModelError(
                f"config.json: compressed-tensors of format {format!r}, {bits!r} bits of type {kind!r}, strategy "
                f"{strategy!r} is not supported; pack-quantized int4 and int8 and float-quantized fp8 are"
            )
        if w.get("actorder") in ("group", "dynamic", True):
            raise ModelError(
                "config.json: compressed-tensors with actorder='group' (act-order) is not supported: quantise "
                "with actorder='weight' or without"
            )

    def shape(self, kernel):
        if self.form.format == "fp8":
            return _matrix(kernel, ".weight")
        shape = kernel.read(".weight_shape", (2,), np.int64, np.int32)
        return tuple(int(n) for n in shape)

    def groups(self, kernel):
        out, rows = self.shape(kernel)
        if self.form.format == "fp8":
            return _fp8(kernel, self.block, ".weight_scale")
        bits, per = self.form.bits, 32 // self.form.bits
        count = -(-rows // (rows if self.group == -1 else self.group))
        if kernel.has(".weight_g_idx"):
            kernel.refuse("it has a weight_g_idx (act-order), which is not supported")
        codes = _unpacked(kernel.read(".weight_packed", (out, -(-rows // per)), np.int32), bits)[
            :, :rows
        ].T
        zeros = None
        if self.form.zero:
            packed = kernel.read(".weight_zero_point", (-(-out // per), count), np.int32)
            zeros = _unpacked(packed.T, bits)[:, :out]
        return codes, kernel.read(".weight_scale", (out, count), *FLOATS).T, zeros


class Fp8(Grouped):
    """weight e4m3 [out, in], weight_scale_inv [out / 128, in / 128], by which it is multiplied.
    DeepSeek-V3, arXiv 2412.19437, section 3.3.
    """

    marks = (".weight_scale_inv",)
    parts = (".weight", ".weight_scale_inv")

    def __init__(self, c: dict):
        self.block = c.get("weight_block_size")
        sound = (
            isinstance(self.block, (list, tuple))
            and len(self.block) == 2
            and all(isinstance(n, int) and n > 0 for n in self.block)
        )
        if c.get("fmt", "e4m3") != "e4m3" or not sound:
            raise ModelError(
                f"config.json: fp8 with fmt={c.get('fmt')!r} and weight_block_size={self.block!r} is not "
                "supported; e4m3 in blocks such as [128, 128] is"
            )
        self.form = Form("fp8", self.block[1])

    def shape(self, kernel):
        return _matrix(kernel, ".weight")

    def groups(self, kernel):
        return _fp8(kernel, self.block, ".weight_scale_inv")


class Mxfp4:
    """The experts of GPT-OSS: blocks uint8 [E, out, in / 32, 16] of two e2m1 codes each, the first
    in the low bits, and scales uint8 [E, out, in / 32], powers of two. OCP Microscaling Formats
    1.0, section 5.3. Dense they are [E, in, out].
    """

    end, marks, parts, form = "", ("_blocks",), ("_blocks", "_scales"), None
    VALUES = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
    )

    def __init__(self, c: dict):
        pass

    def shape(self, kernel):
        E, out, count, half = self._blocks(kernel)
        return E, count * half * 2, out

    def dense(self, kernel):
        """bfloat16, which holds every value exactly."""
        E, out, count, half = shape = self._blocks(kernel)
        codes, scales = (
            kernel.read("_blocks", shape, np.uint8),
            kernel.read("_scales", shape[:3], np.uint8),
        )
        with np.errstate(over="ignore"):
            table = (self.VALUES * 2.0 ** np.arange(-127, 129)[:, None]).astype(ml_dtypes.bfloat16)
        values = table[scales[..., None, None], np.stack([codes & 15, codes >> 4], axis=-1)]
        return np.swapaxes(values.reshape(E, out, count * half * 2), 1, 2)

    def stored(self, kernel, form):
        return None

    def _blocks(self, kernel):
        shape = kernel.shape("_blocks")
        if len(shape) != 4 or shape[3] != 16:
            kernel.refuse(
                f"its blocks have shape {list(shape)}, and [E, out, in / 32, 16] is needed"
            )
        return shape


LAYOUTS = {
    "bitsandbytes": BitsAndBytes,
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "mxfp4": Mxfp4,
}


def _fp8(kernel, block, scale: str):
    """Codes [in, out] and scales [groups, out] of e4m3 in blocks (outputs, inputs), 0 for all of
    them.
    """
    out, rows = _matrix(kernel, ".weight")
    tall, wide = block[0] or out, block[1] or rows
    scales = kernel.read(scale, (-(-out // tall), -(-rows // wide)), *FLOATS).astype(np.float32)
    return (
        kernel.read(".weight", (out, rows), ml_dtypes.float8_e4m3fn).T,
        np.repeat(scales, tall, axis=0)[:out].T,
        None,
    )


def _matrix(kernel, part: str) -> tuple[int, int]:
    shape = kernel.shape(part)
    if len(shape) != 2:
        kernel.refuse(f"{part[1:]} has shape {list(shape)} and should be a matrix")
    return shape


def _block(group) -> int:
    """The block of a form for groups of this many inputs, -1 for all."""
    if not isinstance(group, int) or group == 0 or group < -1 or group % 2 and group > 0:
        raise ModelError(
            f"config.json: group_size={group!r} in quantization_config; an even number or -1 is needed"
        )
    return 128 if group == -1 else group


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes of int32 words along the last axis, low bits first."""
    codes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def _of_groups(codes, scale, zero, form: Form, *, outer=None, offset=None) -> Quantised:
    """Codes [in, out] with scales and zeros [groups, out] as a `Quantised` of numpy arrays; one
    group is repeated over all blocks.
    """
    rows, out = codes.shape
    blocks = -(-rows // form.block)
    codes = np.pad(codes, ((0, blocks * form.block - rows), (0, 0))).reshape(
        blocks, form.block, out
    )

    def whole(x, dtype):
        return None if x is None else np.ascontiguousarray(np.broadcast_to(x, (blocks, out)), dtype)

    return Quantised(
        np.ascontiguousarray(pack(codes) if form.bits == 4 else codes),
        whole(scale, np.float32 if outer is None else np.uint8),
        whole(zero, np.int16),
        outer,
        offset,
        form,
        rows,
        np.dtype(np.float32),
    )


def _dense(value: Quantised) -> np.ndarray:
    """float32 [out, in]."""
    return np.asarray(dequantise(value, np.float32)).T
