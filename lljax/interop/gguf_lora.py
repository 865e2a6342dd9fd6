"""The adapter of a model as a GGUF file, which llama.cpp loads beside a base (`--lora`)."""

import math
from pathlib import Path

import gguf
import numpy as np

from lljax.errors import ConfigError
from lljax.interop.adapter_init import owns_kernel
from lljax.interop.base import Base
from lljax.interop.gguf_layout import Layout, gguf_places
from lljax.interop.gguf_rope import command_options
from lljax.interop.gguf_tokenizer_write import entry
from lljax.interop.gguf_write import TYPES, Tensor, gguf_format, write_file
from lljax.interop.peft.tensors import PREFIX
from lljax.interop.peft.write import factors
from lljax.models.declare import Weight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.lora import adaptable
from lljax.models.lora_layers import TableLora

LORA_TYPES = ("f32", "f16", "bf16")
WHOLE_MODEL = "write the whole model with --format=gguf"
# The names of factors below their layer: A and B, of a linear layer and of a table.
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}


def write_lora_gguf(model: Decoder, base: Base, file: Path, dtype: str = "f32") -> list[str]:
    """Writes the adapter of a model; returns the options of llama.cpp's programs that give the base
    the model's RoPE, which an adapter cannot carry.

    base: the base that the factors belong on, see `lljax.interop.peft.write_adapter`. dtype: one of
    LORA_TYPES. llama.cpp has one alpha for all layers: the scale of a layer with another goes into
    its B.

    Raises:
      ConfigError: an unknown dtype; the run trained more than llama.cpp's adapters hold; or no
        options give a base this RoPE.
    """
    if dtype not in LORA_TYPES:
        raise ConfigError(f"--dtype={dtype} is none of {', '.join(LORA_TYPES)}, for an adapter")
    format = gguf_format(model.spec)
    if reason := _refusal(model):
        raise ConfigError(f"an adapter for llama.cpp cannot be written: {reason}; {WHOLE_MODEL}")
    options = _rope_options(model, base)
    arrays, scales = factors(model, base)
    rslora = next(lora.rslora for _, _, lora in adaptable(model) if lora is not None)
    factor = {
        name: alpha / (math.sqrt(rank) if rslora else rank)
        for name, (rank, alpha) in scales.items()
    }
    first = next(iter(scales))
    alpha = factor[first] * scales[first][0]  # of the first layer; llama.cpp divides it by the rank
    layout, form = Layout(format, model.spec.N, model.spec.K), TYPES[dtype][0]
    tensors = []
    for key, array in arrays.items():
        end = next(end for end in ENDS if key.endswith(end))
        module = key.removeprefix(PREFIX).removesuffix(end)
        weight, part = f"{module}.weight", ENDS[end]
        if part == "b":
            rest = factor[module] / (alpha / scales[module][0])
            array = layout.to_gguf(weight, array) * np.float32(rest)
        elif "embedding" in end:  # of which llama.cpp takes rows
            array = array.T
        places = gguf_places(weight, format)
        if len(places) != 1 or places[0].expert is not None:
            raise ConfigError(
                f"an adapter for llama.cpp cannot be written: the factors of {module} are not "
                f"supported; {WHOLE_MODEL}"
            )
        name = f"{places[0].name}.lora_{part}"
        tensors.append(Tensor(name, array.shape, form, (lambda array=array: array,)))
    metadata = {
        "general.type": entry("adapter"),
        "general.name": entry(Path(base.path).name),
        "general.file_type": entry(int(TYPES[dtype][1])),
        "general.quantization_version": entry(gguf.GGML_QUANT_VERSION),
        "adapter.type": entry("lora"),
        "adapter.lora.alpha": entry(float(alpha)),
    }
    write_file(file, format, metadata, tensors)
    return options


def _refusal(model: Decoder) -> str:
    """What the model trained and llama.cpp's adapters do not hold, or an empty text."""
    adapters = [(name, lora) for name, _, lora in adaptable(model) if lora is not None]
    if not adapters:
        return "the run trained every weight"
    for name, lora in adapters:
        if not isinstance(lora, TableLora) and lora.magnitude is not None:
            return "it has no magnitudes of DoRA"
        if owns_kernel(lora):
            return f"the kernel of {name}, which lora.init='loftq' quantized, is in no base"
    for name, variable in declared(model):
        if isinstance(variable, Weight) and variable.get_metadata().get("trainable", False):
            return f"it holds factors alone, and the run trained {name}"
    return ""


def _rope_options(model: Decoder, base: Base) -> list[str]:
    spec = spec_from_hf(base.config)
    if (model.spec.rope, model.spec.max_length) == (spec.rope, spec.max_length):
        return []
    options = command_options(model.spec.rope, model.spec.H)
    if options is None:
        raise ConfigError(
            f"an adapter for llama.cpp cannot be written: no options of its programs give a base "
            f"the RoPE of the kind {model.spec.rope.type!r} with these values; {WHOLE_MODEL}"
        )
    return options
