"""Reads trained models back, to export, evaluate or generate: a run from its checkpoint, or a base
with an adapter.
"""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lljax.build import abstract_model, adapted_spec, compute_with, fill, open_run_base, sharding_of
from lljax.config import Config, default_config
from lljax.data.template import with_template
from lljax.errors import ConfigError, first_line
from lljax.interop.folder import read_json
from lljax.interop.huggingface import load_weights
from lljax.interop.open import special_tokens, tokenizer_fingerprint
from lljax.interop.peft import adapter_errors, load_adapter, read_adapter_config, under_adapter
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout, make_mesh
from lljax.run.checkpoint import Checkpoints, abstract
from lljax.run.identity import check_identity, check_weights


def restore_run(
    workdir: str | Path, step: int | None = None, layout: Layout | None = None
) -> tuple[Config, Decoder, Any]:
    """Returns (config, model, base) of a run, with the values of its newest checkpoint.

    Arguments and errors as `restore_checkpoint`.
    """
    return restore_checkpoint(workdir, step, layout)[1:]


def restore_checkpoint(
    workdir: str | Path, step: int | None = None, layout: Layout | None = None
) -> tuple[int, Config, Decoder, Any]:
    """Returns (step, config, model, base) of a run, with the values of its newest checkpoint.

    step: the step of the checkpoint; None for the newest that is sound.
    layout: the layout of the model, whatever mesh it was trained on; None for one device.

    Raises:
      ConfigError: the folder holds no run or no such checkpoint; or the base, its tokenizer or its
        weights have changed since the run was started.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    base = open_run_base(config)
    none_yet = ConfigError(f"--workdir={workdir}: the run has no checkpoint yet")
    if not (workdir / "checkpoints").is_dir():
        raise none_yet
    checkpoints = Checkpoints(workdir, **config.checkpoint, read_only=True)
    saved = checkpoints.identity()
    if saved is None:
        raise none_yet
    tokenizer = base.tokenizer()
    now = {
        "base": base.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "special_tokens": special_tokens(tokenizer),
    }
    check_identity(saved, saved | now)
    model = abstract_model(config, base.config)
    mesh = layout.mesh if layout else make_mesh(devices=jax.local_devices()[:1])
    check_weights(saved.get("weights", {}), fill(model, config, base, mesh))
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    like = {"trainable": jax.tree.map(abstract, nnx.as_pure(trainable))}
    restored = checkpoints.restore(like, step)
    if restored is None:
        raise none_yet
    checkpoints.close()
    step, items, _ = restored
    return step, config, nnx.merge(graphdef, items["trainable"], nnx.as_pure(frozen)), base


def read_config(workdir: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
      ConfigError: there is no config.json, or it is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir}: no run was started there (no config.json)")
    config = default_config()
    try:
        with config.unlocked():
            config.update(read_json(path))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not the configuration of a run ({first_line(error)}): restore "
            "the file that the run wrote"
        ) from None
    return config


def trained_template(workdir: Path, base: Any) -> str | None:
    """The chat template that a run trained under if its base has none; None if the base has a
    template, or the run trained no conversation.
    """
    path = Path(workdir) / "data_statistics.json"
    statistics = read_json(path).get("train") if path.is_file() else None
    conversations = statistics.get("conversations", 1) if isinstance(statistics, dict) else 1
    tokenizer = base.tokenizer()
    if not conversations or tokenizer.chat_template is not None:
        return None
    return with_template(tokenizer).chat_template


def load_adapted_base(
    base: Any,
    adapter: Path,
    dtype: Any,
    layout: Layout | None = None,
    quantize: str = "none",
    matmul: str = "default",
) -> Decoder:
    """A base with an adapter in PEFT's format, under `adapted_spec`. layout, quantize, matmul: see
    `load_base`.

    Raises:
      ModelError: the folder holds no adapter, or an adapter of another base.
    """
    base = under_adapter(base, adapter)
    model = Decoder(adapted_spec(base, adapter))
    with adapter_errors(adapter):
        read_adapter_config(adapter).attach(model)
    compute_with(model, base, dtype, quantize, matmul)
    load_weights(model, base, dtype=dtype, shardings=sharding_of(layout))
    load_adapter(model, adapter, shardings=sharding_of(layout))
    return model
