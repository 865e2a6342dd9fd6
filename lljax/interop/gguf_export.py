"""Exports for llama.cpp, Ollama and LM Studio: a model or an adapter in a GGUF file."""

import shlex
from pathlib import Path

from lljax.interop.base import Base
from lljax.interop.export import check_model
from lljax.interop.export_folder import write_folder
from lljax.interop.export_weights import MergedBase
from lljax.interop.gguf_lora import write_lora_gguf
from lljax.interop.gguf_write import write_gguf
from lljax.models.decoder import Decoder


def export_gguf(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> str:
    """Writes the merged model as one GGUF file; returns how to load it.

    dtype: a key of `lljax.interop.gguf_write.TYPES`; None for f16. Other arguments and errors as
    `lljax.interop.export.export_merged`.
    """
    type = dtype or "f16"
    name = f"model-{type}.gguf"
    check_model(model, base, out)

    def write(folder: Path) -> None:
        merged = MergedBase(model, base)
        write_gguf(merged, model.spec, folder / name, type=type, chat_template=chat_template)
        (folder / "Modelfile").write_text(f"FROM ./{name}\n")

    write_folder(out, "gguf", write, overwrite)
    return (
        f"# llama-server -m {_quoted(out / name)} -c {model.spec.max_length}\n"
        f"# ollama create NAME -f {_quoted(out / 'Modelfile')}"
    )


def export_gguf_lora(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> str:
    """Writes the adapter as a GGUF file for a base in GGUF; returns how to load it.

    dtype: one of `lljax.interop.gguf_lora.LORA_TYPES`; None for f32. chat_template: not part of an
    adapter. Other arguments and errors as `lljax.interop.export.export_peft`.
    """
    name = f"adapter-{dtype or 'f32'}.gguf"
    check_model(model, base, out)
    options = write_folder(
        out,
        "gguf_lora",
        lambda folder: write_lora_gguf(model, base, folder / name, dtype or "f32"),
        overwrite,
    )
    return (
        "# BASE.gguf: the base, as a GGUF file\n"
        f"# llama-server -m BASE.gguf --lora {_quoted(out / name)} "
        f"{' '.join([*options, '-c', str(model.spec.max_length)])}"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
