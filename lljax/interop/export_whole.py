"""Exports of a multimodal model with its trained text model in it: all other tensors, such as those
of the vision model and of multi-token prediction, are written as they are.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lljax.config.exports import REFUSALS, TEXT
from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.base import Base
from lljax.interop.export import SHARD_BYTES, check_model
from lljax.interop.export_files import write_files
from lljax.interop.export_folder import write_folder
from lljax.interop.export_weights import MergedBase, finite_value
from lljax.interop.folder import read_json
from lljax.interop.fused_experts import FUSED, SplitExperts
from lljax.interop.multimodal import Whole, names_on_disk
from lljax.interop.usage import serve_command
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec

# Files beside the weights that the text model does not need.
PROCESSOR_FILES = ("*processor_config.json", "chat_template.json")


def export_whole(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    overwrite: bool = False,
    chat_template: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes the multimodal model that the base is a part of, with the adapter merged into its text
    model, in the dtypes of the base; returns how to load it.

    Arguments and errors as `lljax.interop.export.export_merged`.
    """
    whole, source = base.whole, base.folder
    if whole is None or source is None:
        raise ConfigError(f"--format=whole: {REFUSALS['whole'][TEXT]}")
    if "quantization_config" in base.config:
        raise ConfigError(
            f"--format=whole: {base.path} is quantized, and its text model would not be: use "
            "--format=merged"
        )
    check_model(model, base, out)
    tensors = MultimodalTensors(model, base, source, whole)

    def write(folder: Path) -> None:
        safetensors.write_sharded(
            folder, tensors.layout, tensors.value, max_shard_bytes=max_shard_bytes
        )
        tokenizer = base.tokenizer()
        write_files(base, folder, model.spec, tokenizer, dtype=None, chat_template=chat_template)
        for pattern in PROCESSOR_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        config = whole_config(read_json(source / "config.json"), whole, model.spec)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_folder(out, "whole", write, overwrite)
    logging.info(
        "%d tensors are written as they are, such as %s",
        len(tensors.others),
        ", ".join(tensors.others[:3]) or "none",
    )
    return (
        "import transformers\n"
        f"model = transformers.AutoModelForImageTextToText.from_pretrained({str(out)!r})\n"
        f"{serve_command(model.spec, out, {})}"
    )


class MultimodalTensors:
    """The tensors of a multimodal checkpoint with a trained text model in place of its own.

    layout: of all tensors, by their names on disk. others: names of those that are copied.
    """

    def __init__(self, model: Decoder, base: Base, folder: Path, whole: Whole):
        self._merged, self._stored = MergedBase(model, base), safetensors.Folder(folder)
        self._experts = base if isinstance(base, SplitExperts) else None
        stored, own = self._stored.names(), set(self._merged.names())
        names = names_on_disk(whole.model, stored)
        self._texts = {
            name: text
            for name in stored
            for text in [names.text(name)]
            if text in own or self._experts and text and FUSED.fullmatch(text)
        }
        # The head of a tied model is a copy of the embedding as it was.
        unread = {name for name in stored if model.spec.tied and name == names.of("lm_head.weight")}
        self.others = [name for name in stored if name not in self._texts and name not in unread]
        self.layout: safetensors.Table = {
            name: (self._stored.dtype(name), self._stored.shape(name))
            for name in (*self._texts, *self.others)
        }

    def value(self, name: str) -> np.ndarray:
        """A tensor by its name on disk.

        Raises:
          ConfigError: a trained weight is not finite in the dtype of the base.
        """
        text = self._texts.get(name)
        if text is None:
            return self._stored.read(name)
        fused = self._experts and self._experts.fused(text, self._trained)
        return self._trained(text) if fused is None else fused

    def _trained(self, text: str) -> np.ndarray:
        return finite_value(self._merged, text, copied=text in self._merged.copied)


def whole_config(config: dict[str, Any], whole: Whole, spec: DecoderSpec) -> dict[str, Any]:
    """config.json of the multimodal model with the RoPE and the length of its text model."""
    entries = whole.rope(spec)
    if isinstance(config.get("text_config"), dict):
        return config | {"text_config": config["text_config"] | entries}
    return config | entries
