"""Loads an adapter into a model, and gives the base as the adapter takes it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.base import Base
from lljax.interop.huggingface import hf_names, hf_shape
from lljax.interop.own_head import EMBED, HEAD, OwnHead
from lljax.interop.peft.config import (
    MERGE_FIRST,
    AdapterConfig,
    adapter_errors,
    read_adapter_config,
)
from lljax.interop.peft.tensors import PREFIX, WEIGHTS, AdapterFile, text_name
from lljax.models.declare import Weight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import family_of, is_tied
from lljax.models.lora import TABLES, adaptable, hf_module, matched_tables, pattern_value
from lljax.parallel.sharding import put

# Tables of the base that PEFT writes beside the factors of one of them.
BASE_TABLES = (
    "model.embed_tokens.weight",
    "model.embed_tokens.base_layer.weight",
    "lm_head.weight",
    "lm_head.base_layer.weight",
)


def adapter_fingerprint(folder: Path | str) -> str:
    """A digest of an adapter's weights and settings.

    Raises:
      ModelError: one of its files cannot be read, or as `read_adapter_config`.
    """
    read_adapter_config(folder)
    digest = hashlib.sha256()
    for name in ("adapter_config.json", WEIGHTS):
        path = Path(folder) / name
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ModelError(f"{path}: it cannot be read ({reason})") from None
    return digest.hexdigest()[:16]


def unties_head(hf_config: dict, folder: Path | str) -> bool:
    """Whether an adapter takes the head of a tied base and its embedding for two tables.

    PEFT wraps or adapts the named table and leaves the other unchanged, unless
    `ensure_weight_tying`.

    Raises:
      ModelError: it adapts both by the same factors.
    """
    settings = read_adapter_config(folder)
    if not is_tied(hf_config):
        return False
    family = family_of(hf_config).model_type
    with adapter_errors(folder):
        adapted = matched_tables(text_name(target, family) for target in settings.targets)
    if not adapted and not {"embed", "head"} & set(settings.also_train):
        return False
    if settings.ties and adapted:
        raise ModelError(
            f"{folder}: ensure_weight_tying with {sorted(adapted)[0]!r} in target_modules is not "
            f"supported; {MERGE_FIRST}"
        )
    return not settings.ties


def under_adapter(base: Base, folder: Path | str) -> Base:
    """The base as an adapter takes it: untied, if `unties_head`."""
    return OwnHead(base) if unties_head(base.config, folder) else base


def load_adapter(model: Decoder, folder: Path | str, *, shardings: Callable | None = None) -> None:
    """Fills the factors and the trained base Variables of a model (adapters attached) from the
    folder of an adapter.

    Raises:
      ModelError: a tensor is missing, left over, or has another shape; the model scales its factors
        in another way.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    tied = {"model_type": model.spec.family, "tie_word_embeddings": True}
    if model.spec.tied and unties_head(tied, folder):
        raise ModelError(
            f"{folder}: it trains the head of a tied base or its embedding alone, and this model "
            "has one table for both: open the base with lljax.interop.peft.under_adapter"
        )
    _check_settings(model, config, folder)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; adapters are read from safetensors only")
    file = AdapterFile(path, model.spec.family)
    unread = set(file.entries)
    for _, variable in declared(model):
        if not variable.get_metadata().get("trainable", False):
            continue
        names = [PREFIX + name for name in hf_names(variable)]
        if isinstance(variable, Weight) and names[0] not in file.entries:
            continue  # it trains from its base value on
        for name in names:
            _check_entry(file, name, hf_shape(variable))
        unread -= set(names)
        layers = [np.asarray(file.read(name), np.float32) for name in names]
        layers = [layer.T if variable.get_metadata("transpose") else layer for layer in layers]
        value = np.stack(layers).reshape(variable.get_value().shape)
        variable.set_value(put(value, shardings(variable) if shardings else None))
    unread -= _base_tables(model, file)
    if unread:
        raise ModelError(
            f"{path}: {len(unread)} tensors have no place in this configuration, such as "
            f"{sorted(unread)[0]!r}: name their modules in lora.targets or lora.also_train"
        )


def _check_settings(model: Decoder, config: AdapterConfig, folder: Path | str) -> None:
    """Refuses a model whose factors mean something else than the adapter's, which shapes do not
    show.
    """
    for name, weight, lora in adaptable(model):
        if lora is None:
            continue
        if "part" in weight.get_metadata():
            raise ModelError(
                f"{folder}: {name} is a part of {hf_module(name, weight)}, whose one pair of "
                f"factors does not split into its parts; {MERGE_FIRST}"
            )
        alpha = pattern_value(config.alpha_pattern, name, weight, "alpha_pattern", config.alpha)
        adapter = (alpha, config.rslora, config.dora)
        if (lora.alpha, lora.rslora, lora.magnitude is not None) != adapter:
            raise ModelError(
                f"{folder}: the adapter has alpha={alpha}, rslora={config.rslora} and "
                f"dora={config.dora}: set lora.alpha, lora.alpha_pattern, lora.rslora and "
                "lora.dora as it has them"
            )


def _check_entry(file: safetensors.File, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a file without a floating-point tensor of this name and shape."""
    if name not in file.entries:
        raise ModelError(f"{file.path}: tensor {name!r} is missing")
    dtype, stored, _ = file.entries[name]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ModelError(
            f"{file.path}: tensor {name!r} is {dtype}, and factors are floating-point numbers"
        )
    if stored != shape:
        raise ModelError(
            f"{file.path}: tensor {name!r} has shape {stored}, and the model has {shape}: set "
            "lora.rank, lora.rank_pattern and lora.targets as in the adapter"
        )


def _base_tables(model: Decoder, file: safetensors.File) -> set[str]:
    """Tensors of an adapter that its model needs no place for: the tied head's copy of the trained
    embedding, and tables of the base beside their factors.

    Raises:
      ModelError: the head was trained apart from the embedding.
    """
    tables = set()
    head, embed = PREFIX + HEAD, PREFIX + EMBED
    if model.spec.tied and {head, embed} <= file.entries.keys():
        if not np.array_equal(file.read(head), file.read(embed)):
            raise ModelError(
                f"{file.path}: lm_head was trained apart from the embedding it is tied to; this "
                "model has no place for both"
            )
        tables.add(head)
    if any(lora is not None for name, _, lora in adaptable(model) if name in TABLES):
        tables |= {PREFIX + name for name in BASE_TABLES}
    return tables
