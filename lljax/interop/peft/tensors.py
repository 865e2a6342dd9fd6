"""Names of PEFT's tensors and modules, and the HF names of adapted layers."""

from pathlib import Path

from lljax.interop import safetensors
from lljax.models.families import FAMILIES

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# Modules that `modules_to_save` holds, by role; norms have several names.
MODULES = {"embed": "embed_tokens", "head": "lm_head"}


def text_name(name: str, family: str) -> str:
    """The name in the text model of a module or tensor that an adapter names as a multimodal model
    does; other names, such as those of a text model's own adapter, are returned.
    """
    for whole in FAMILIES[family].multimodal_parents:
        for names in whole.names:
            if names.model != "model" and (text := names.text(name)) is not None:
                return text
    return name


class AdapterFile(safetensors.File):
    """The tensors of an adapter, under the names that they have in the text model."""

    def __init__(self, path: Path, family: str):
        super().__init__(path)
        self.entries = {
            PREFIX + text_name(name.removeprefix(PREFIX), family): entry
            for name, entry in self.entries.items()
        }
