"""What was trained, read back to export it, to evaluate it or to talk to it: a run, or an adapter
on its base.
"""

from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from lljax.build import abstract_model, adapted_spec, fill, open_run_base, places
from lljax.config import default_config
from lljax.data.template import with_template
from lljax.errors import ConfigError, first_line
from lljax.interop.folder import read_json
from lljax.interop.huggingface import load_weights
from lljax.interop.open import special_tokens, tokenizer_fingerprint
from lljax.interop.peft import load_adapter, named, read_adapter_config, under_adapter
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout, make_mesh
from lljax.run.checkpoint import Checkpoints, abstract
from lljax.run.identity import check_identity, check_weights


def restore_run(workdir, step: int | None = None, layout: Layout | None = None):
    """Returns (config, model, base): the model with the values of its last checkpoint, or of that
    of `step`.

    It lies as `layout` says, by default on one device, whatever mesh it was trained on.

    Raises:
      ConfigError: the folder holds no run, or no such checkpoint; or the base, its tokenizer or its
        weights are not those that the run was trained with.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    base = open_run_base(config)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir}: the run has no checkpoint yet")
    checkpoints = Checkpoints(workdir, **config.checkpoint, read_only=True)
    begun = checkpoints.identity()
    if begun is None:
        raise ConfigError(f"--workdir={workdir}: the run has no checkpoint yet")
    tokenizer = base.tokenizer()
    check_identity(
        begun,
        begun
        | {
            "base": base.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "special_tokens": special_tokens(tokenizer),
        },
    )
    model = abstract_model(config, base.config)
    check_weights(
        begun.get("weights", {}),
        fill(
            model,
            config,
            base,
            layout.mesh if layout else make_mesh(devices=jax.local_devices()[:1]),
        ),
    )
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    _, items, _ = checkpoints.restore(
        {"trainable": jax.tree.map(abstract, nnx.as_pure(trainable))}, step
    )
    checkpoints.close()
    return config, nnx.merge(graphdef, items["trainable"], nnx.as_pure(frozen)), base


def read_config(workdir: Path) -> ConfigDict:
    """The configuration that a run was started with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir}: no run was started there (no config.json)")
    config = default_config()
    try:
        with config.unlocked():
            config.update(read_json(path))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not the configuration of a run ({first_line(error)}): put that back"
        ) from None
    return config


def trained_template(workdir: Path, base) -> str | None:
    """The chat template that a run trained under for want of one in its base; None where it trained
    no conversation.
    """
    path = Path(workdir) / "data_statistics.json"
    statistics = read_json(path).get("train") if path.is_file() else None
    conversations = statistics.get("conversations", 1) if isinstance(statistics, dict) else 1
    tokenizer = base.tokenizer()
    return (
        with_template(tokenizer).chat_template
        if conversations and tokenizer.chat_template is None
        else None
    )


def adapted_base(base, adapter: Path, dtype, layout: Layout | None = None) -> Decoder:
    """A base with an adapter in PEFT's format on it, under `adapted_spec`. layout: as `load_base`
    takes it.

    Raises:
      ModelError: the adapter is none, or not of this base.
    """
    base = under_adapter(base, adapter)
    model = Decoder(adapted_spec(base, adapter))
    with named(adapter):
        read_adapter_config(adapter).attach(model)
    load_weights(model, base, dtype=dtype, shardings=places(layout))
    load_adapter(model, adapter, shardings=places(layout))
    return model
