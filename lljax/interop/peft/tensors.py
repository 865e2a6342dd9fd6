"""Names of PEFT's tensors and modules, and the HF names of adapted layers."""

from flax import nnx

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# Modules that `modules_to_save` holds, by role; norms have several names.
MODULES = {"embed": "embed_tokens", "head": "lm_head"}


def hf_module(name: str, weight: nnx.Variable) -> str:
    """The dotted HF name of a layer; several of our layers may be one there."""
    hf = weight.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
    return ".".join(part for part in (name.rpartition(".")[0], hf) if part)
