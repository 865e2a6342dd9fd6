"""Exports of a trained model for PyTorch: an adapter, a merged model, or a model and an adapter
apart, for a server that takes plain LoRA.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lljax.config.exports import refusal
from lljax.errors import ConfigError, printable
from lljax.interop.base import Base
from lljax.interop.export_files import TEMPLATE_FILE
from lljax.interop.export_folder import write_folder
from lljax.interop.export_weights import write_model
from lljax.interop.peft import write_adapter
from lljax.interop.usage import (
    QUIET,
    adapter_usage,
    loader,
    lora_options,
    properties_of,
    serve_command,
)
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import rope_to_hf

SHARD_BYTES = 5 << 30
DTYPES = ("float32", "bfloat16", "float16")


def export_peft(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> str:
    """Writes the adapter in PEFT's format, with trained embeddings and norms; returns how to load
    it.

    dtype: none, since an adapter is float32. overwrite: replaces an earlier export in `out`.
    chat_template: the template that the run trained under, if the base has none.

    Raises:
      ConfigError: the run trained every weight, a weight is not finite, or `out` is taken.
    """
    _check_format(model, "peft")
    if dtype not in (None, "float32"):
        raise ConfigError(
            f"--dtype={dtype}: an adapter is written in float32 and cast when it is loaded; "
            "--dtype is for --format=merged and --format=split"
        )

    def write(folder: Path) -> dict[str, Any]:
        whole = base.adapted
        names = whole.model.names[0] if whole else None
        config = write_adapter(model, folder, base_name=base.path, base=base, names=names)
        rope = whole.rope(model.spec) if whole else rope_to_hf(model.spec)
        (folder / "rope.json").write_text(json.dumps(rope, indent=2) + "\n")
        if chat_template is not None:
            (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        return config

    check_model(model, base, out)
    config = write_folder(out, "peft", write, overwrite)
    return adapter_usage(model, base, out, config, chat_template)


def export_merged(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a full HF checkpoint with the adapter merged, and the RoPE and lengths that
    transformers and vLLM need; returns how to load it.

    dtype: the dtype of the weights, one of DTYPES; None for the base's, to which trained weights
    are rounded.
    Other arguments and errors as `export_peft`.
    """
    _check_dtype(dtype)
    check_model(model, base, out)

    def write(folder: Path) -> str:
        return write_model(
            model,
            base,
            folder,
            merge=True,
            dtype=dtype,
            chat_template=chat_template,
            max_shard_bytes=max_shard_bytes,
        )

    rounded = write_folder(out, "merged", write, overwrite)
    return (
        "import transformers\n"
        f"model = {loader(model.spec)}({str(out)!r})\n"
        f"{serve_command(model.spec, out, {})}{rounded}"
    )


def export_split(
    model: Decoder,
    base: Base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes `out`/base, the base with the tuned embeddings and norms and its RoPE, and
    `out`/adapter, the factors alone, which vLLM's --enable-lora takes; returns how to serve them.

    Arguments and errors as `export_merged`.
    """
    _check_format(model, "split")
    _check_dtype(dtype)
    check_model(model, base, out)

    def write(folder: Path) -> tuple[str, dict[str, Any]]:
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        rounded = write_model(
            model,
            base,
            folder / "base",
            merge=False,
            dtype=dtype,
            chat_template=chat_template,
            max_shard_bytes=max_shard_bytes,
        )
        name = str(out.resolve() / "base")
        return rounded, write_adapter(
            model, folder / "adapter", base_name=name, base=base, whole_modules=False
        )

    rounded, config = write_folder(out, "split", write, overwrite)
    command = serve_command(model.spec, out / "base", lora_options(out / "adapter", config))
    return (
        f"{command}\n"
        "import peft, transformers\n"
        f"model = {loader(model.spec)}({str(out / 'base')!r})\n"
        f"{QUIET}model = peft.PeftModel.from_pretrained(model, {str(out / 'adapter')!r}){rounded}"
    )


def _check_format(model: Decoder, format: str) -> None:
    if reason := refusal(format, properties_of(model)):
        raise ConfigError(f"--format={format}: {reason}")


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype={dtype} is none of {', '.join(DTYPES)}")


def check_model(model: Decoder, base: Base, out: Path) -> None:
    """Refuses a model with values that are not finite, and a folder that holds the base."""
    for name, variable in declared(model):
        if not variable.get_metadata().get("trainable", False):
            continue
        # of a weight that trains in eight bits: its codes and scales
        if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(variable.get_value())):
            raise ConfigError(
                f"{name} holds values that are not finite, so nothing is exported: take an earlier "
                "checkpoint with --step"
            )
    if base.location.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--out={printable(str(out))} holds the base of the run: name another folder"
        )
