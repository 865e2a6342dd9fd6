"""Formats of quantized kernels in published checkpoints: a class each in the table `LAYOUTS`, and
a writer in `WRITERS`.
"""

from lljax.errors import ModelError
from lljax.interop.layouts.bitsandbytes import BitsAndBytes
from lljax.interop.layouts.grouped import Awq, CompressedTensors, Fp8, Gptq
from lljax.interop.layouts.kernel import Kernel, Layout
from lljax.interop.layouts.mxfp4 import Mxfp4
from lljax.interop.layouts.write import WRITERS, Codes, LayoutWriter, Scheme
from lljax.models.quantize import FORMS, Form

__all__ = [
    "LAYOUTS",
    "WRITERS",
    "Codes",
    "Kernel",
    "Layout",
    "LayoutWriter",
    "Scheme",
    "form_of",
    "layout_of",
]

LAYOUTS = {  # by quantization_config.quant_method
    "bitsandbytes": BitsAndBytes,
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "mxfp4": Mxfp4,
}


def form_of(quantize: str, hf_config: dict) -> Form | None:
    """The form of a run's kernels under `model.quantize`: as on disk, if the base has that format;
    None for dense kernels.

    Raises:
      ModelError: config.json's quantization_config is of an unsupported kind.
    """
    layout = layout_of(hf_config)
    if quantize == "none":
        return None
    if layout and layout.form and layout.form.format == quantize:
        return layout.form
    return FORMS[quantize]


def layout_of(hf_config: dict) -> Layout | None:
    """The format of kernels in config.json's quantization_config; None if there is none.

    Raises:
      ModelError: an unsupported format.
    """
    c = hf_config.get("quantization_config")
    if not c:
        return None
    method = c.get("quant_method") if isinstance(c, dict) else None
    if method not in LAYOUTS:
        raise ModelError(
            f"config.json: quantization_config.quant_method={method!r} is none of "
            f"{', '.join(LAYOUTS)}: use the model that it was made from"
        )
    return LAYOUTS[method](c)
