"""bitsandbytes NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

import json
import math
from typing import Any

import numpy as np

from lljax.errors import ModelError
from lljax.interop.layouts.kernel import Kernel, Shape
from lljax.interop.layouts.packing import quantized_of_groups
from lljax.models.quantize import DYNAMIC, FORMS, NF4, OUTER, Form, Quantized
from lljax.parallel.rounding import cdiv

STATE = ".weight.quant_state.bitsandbytes__nf4"


class BitsAndBytes:
    """NF4 of [out, in] flattened, two codes to a byte with the first in the high bits, and scales
    of blocks of 64, which may have eight bits themselves ("nested").

    bitsandbytes `QuantState.as_dict(packed=True)`.
    """

    end = ".weight"
    marks = (STATE,)
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
                "config.json: of bitsandbytes, load_in_4bit with bnb_4bit_quant_type 'nf4' is "
                f"supported; this is {'8 bits' if c.get('load_in_8bit') else repr(kind)}"
            )
        self.form: Form | None = FORMS[
            "nf4-double" if c.get("bnb_4bit_use_double_quant") else "nf4"
        ]

    def _state(self, kernel: Kernel) -> dict[str, Any]:
        try:
            state = json.loads(bytes(kernel.read(STATE, kernel.shape(STATE), np.uint8)))
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
        return state | {"blocks": cdiv(out * rows, block)}

    def shape(self, kernel: Kernel) -> Shape:
        return tuple(self._state(kernel)["shape"])

    def _codes(self, kernel: Kernel, state: dict) -> np.ndarray:
        """uint8 [out, in]."""
        if not np.array_equal(kernel.read(".weight.quant_map", (16,), np.float32), NF4):
            kernel.refuse("its quant_map is not NF4's")
        packed = kernel.read(".weight", (math.prod(state["shape"]) // 2,), np.uint8)
        return np.stack([packed >> 4, packed & 15], axis=-1).reshape(state["shape"])

    def _nested(self, kernel: Kernel, state: dict) -> tuple[np.ndarray, np.ndarray]:
        """The codes of quantized scales, uint8 [blocks], and their scales, float32."""
        codes = kernel.read(".weight.absmax", (state["blocks"],), np.uint8)
        count = cdiv(state["blocks"], OUTER)
        return codes, kernel.read(".weight.nested_absmax", (count,), np.float32)

    def _scales(self, kernel: Kernel, state: dict) -> np.ndarray:
        """float32 [blocks]."""
        if not kernel.has(".weight.nested_absmax"):
            return kernel.read(".weight.absmax", (state["blocks"],), np.float32)
        codes, outer = self._nested(kernel, state)
        table = kernel.read(".weight.nested_quant_map", (256,), np.float32)
        scales = table[codes] * np.repeat(outer, OUTER)[: len(codes)]
        return scales + np.float32(state["nested_offset"])

    def dense(self, kernel: Kernel) -> np.ndarray:
        state = self._state(kernel)
        codes = self._codes(kernel, state)
        scales = np.repeat(self._scales(kernel, state), state["blocksize"])[: codes.size]
        return (NF4[codes].reshape(-1) * scales).reshape(codes.shape)

    def stored(self, kernel: Kernel, form: Form) -> Quantized | None:
        state = self._state(kernel)
        (out, rows), block = state["shape"], state["blocksize"]
        if form.format not in ("nf4", "nf4-double") or form.block != block or rows % block:
            return None  # our blocks do not run over the end of a row
        codes = self._codes(kernel, state).T
        if form.format == "nf4":
            scales = self._scales(kernel, state).reshape(out, -1).T
            return quantized_of_groups(codes, scales, None, form)
        if not kernel.has(".weight.nested_absmax"):
            return None
        scales, outer = self._nested(kernel, state)
        table = kernel.read(".weight.nested_quant_map", (256,), np.float32)
        if not np.allclose(table, DYNAMIC, rtol=0, atol=1e-6):
            kernel.refuse("its nested_quant_map is not bitsandbytes' dynamic map")
        return quantized_of_groups(
            codes,
            scales.reshape(out, -1).T,
            None,
            form,
            outer=outer,
            offset=np.float32(state["nested_offset"]),
        )
