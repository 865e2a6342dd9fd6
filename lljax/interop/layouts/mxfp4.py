"""MXFP4, the format of experts that are stored together (OCP Microscaling Formats 1.0)."""

import ml_dtypes
import numpy as np

from lljax.interop.layouts.kernel import Kernel, Shape
from lljax.models.quantize import Form

VALUES = np.array(  # values of the e2m1 codes
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)


class Mxfp4:
    """Experts [E, in, out] as blocks uint8 [E, out, in / 32, 16] of two e2m1 codes each, the first
    in the low bits, and scales uint8 [E, out, in / 32], powers of two.

    OCP Microscaling Formats 1.0, section 5.3; transformers `integrations/mxfp4.py`.
    """

    end = ""
    marks = ("_blocks",)
    parts = ("_blocks", "_scales")
    form: Form | None = None

    def __init__(self, c: dict):
        pass  # the format has no options

    def shape(self, kernel: Kernel) -> Shape:
        E, out, count, half = self._blocks_shape(kernel)
        return E, count * half * 2, out

    def dense(self, kernel: Kernel) -> np.ndarray:
        """bfloat16, which holds every value exactly."""
        E, out, count, half = shape = self._blocks_shape(kernel)
        codes = kernel.read("_blocks", shape, np.uint8)
        scales = kernel.read("_scales", shape[:3], np.uint8)
        with np.errstate(over="ignore"):
            table = (VALUES * 2.0 ** np.arange(-127, 129)[:, None]).astype(ml_dtypes.bfloat16)
        values = table[scales[..., None, None], np.stack([codes & 15, codes >> 4], axis=-1)]
        return np.swapaxes(values.reshape(E, out, count * half * 2), 1, 2)

    def stored(self, kernel: Kernel, form: Form) -> None:
        return None

    def _blocks_shape(self, kernel: Kernel) -> Shape:
        shape = kernel.shape("_blocks")
        if len(shape) != 4 or shape[3] != 16:
            kernel.refuse(
                f"its blocks have shape {list(shape)}, and [E, out, in / 32, 16] is needed"
            )
        return shape
