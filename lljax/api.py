"""The Python interface: prepare a model, train it, use it."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lljax.build import attach_adapters, load_base, stretched
from lljax.config import FIELDS, Config, default_config, validate
from lljax.config.checks import TOKENS, Several, one_of, required, text, whole
from lljax.config.checks import path as is_path
from lljax.config.field_names import unknown_field
from lljax.config.shipped import absolute_path
from lljax.data.prompt_tokens import chat_tokens, text_tokens
from lljax.data.template import with_template
from lljax.errors import ConfigError
from lljax.exports import Exported, Options, write_export
from lljax.generation.generate import generate as continue_prompts
from lljax.generation.sample import Sampling
from lljax.hardware.host_memory import set_pinned_limit
from lljax.interop.adapter_init import ResidualBase, starts_from_base
from lljax.interop.huggingface import load_weights
from lljax.interop.lora_config import config_fields, read_lora_config
from lljax.interop.open import end_tokens, open_base
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.quantize import FORMS
from lljax.models.spec import DecoderSpec
from lljax.parallel.processes import processes_on_host
from lljax.run import loop
from lljax.run.restore import trained_template

# Prefixes of fields that prepare_model sets, and train refuses.
PREPARED = ("model.", "lora.", "context.rope.", "context.length", "train_type")


def prepare_model(
    model: str | os.PathLike | Decoder,
    lora_config: Any = None,
    *,
    dtype: str = "float32",
    quantize: str = "none",
) -> Any:
    """`prepare_model(path)` -> (model, tokenizer).
    `prepare_model(model, lora_config)` -> the model with adapters.

    path: a hub id, a folder, or a GGUF file. quantize: as `model.quantize`.
    lora_config: a peft.LoraConfig, or a mapping of its fields. Supported are r, lora_alpha,
      target_modules (None: q, k, v and o), lora_dropout, use_rslora, use_dora, rank_pattern,
      alpha_pattern, init_lora_weights (True, "pissa", "pissa_niter_N", "olora", "loftq") and
      modules_to_save ("embed_tokens", "lm_head", "norm" for all norms). Any other field is refused
      unless it has its default. A mapping may also have use_longlora: embeddings and norms train
      too, and YaRN stretches RoPE, to longlora_scaling_factor times the length it was trained for,
      or to longlora_sequence_length.

    Raises:
      ConfigError: an unknown field or an illegal value. ModelError: the base cannot be read.
    """
    if isinstance(model, Decoder) and lora_config is not None:
        return _adapt(model, read_lora_config(lora_config))
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            "prepare_model takes a path, or a model from prepare_model(path) and a lora_config"
        )
    one_of("float32", "bfloat16")("prepare_model: dtype", dtype)
    one_of("none", *FORMS)("prepare_model: quantize", quantize)
    set_pinned_limit(processes_on_host)
    path = os.fspath(model)
    FIELDS["model.path"]("prepare_model: path", path)
    path = absolute_path(path)  # an export names it, and is loaded in other folders
    base = open_base(path)
    decoder: Any = load_base(base, spec_from_hf(base.config), jnp.dtype(dtype), quantize)
    decoder.settings = (("model.path", path), ("model.dtype", dtype), ("model.quantize", quantize))
    if lora_config is not None:
        decoder = _adapt(decoder, read_lora_config(lora_config))
    return decoder, base.tokenizer()


def train(
    model: Decoder,
    *,
    data: str | os.PathLike | Sequence[str | os.PathLike],
    workdir: str | os.PathLike,
    steps: int,
    length: int | None = None,
    **fields: Any,
) -> Decoder:
    """Trains a prepared model on JSONL `data` for `steps`; the same call again resumes.

    data: a file, a folder, or several. length: tokens a row, by default all that the model reads.
    A LongLoRA model trains in shifted attention for the first three quarters of the steps, then
    in full attention. fields: further fields of the configuration, by their dotted names with "__"
    for ".", for example optimizer__learning_rate=1e-4.

    Returns: the trained model. The arrays of `model` are donated: do not use it again.

    Raises:
      ConfigError: a model without adapters, an unknown field or an illegal value; and the errors
        of lljax.run.loop.train.
    """
    from lljax.evaluation.eval_hook import (
        make_eval_hook,  # imported here: slow, and only needed to train
    )

    settings = _settings(model)
    if "lora.rank" not in settings:
        raise ConfigError(
            "lljax.train: this model has no adapters: model, tokenizer = "
            "lljax.prepare_model(path), then model = lljax.prepare_model(model, "
            "lora_config)"
        )
    _check_folder("lljax.train: workdir", workdir)
    whole(1)("lljax.train: steps", steps)
    length = model.spec.max_length if length is None else length
    whole(2, TOKENS)("lljax.train: length", length)
    bulk = 3 * steps // 4 if settings.pop("longlora") else 0
    schedule = ((bulk, length, "shifted"),) if bulk else ()
    files = data if isinstance(data, (tuple, list)) else (data,)
    settings |= {
        "data.train": tuple(os.fspath(f) if isinstance(f, os.PathLike) else f for f in files),
        "alarm.stall_minutes": 0.0,  # the user can interrupt a run that hangs
        "context.length": model.spec.max_length,
        "context.schedule": (*schedule, (steps, length, "full")),
        **_dotted(fields),
    }
    c = _configuration(settings, "lljax.train")
    trained: Any = loop.train(c, Path(workdir), model=model, make_eval_hook=make_eval_hook)
    trained.workdir = str(workdir)
    return trained


def export(
    model: Decoder,
    path: str | os.PathLike,
    *,
    format: str = "peft",
    overwrite: bool = False,
    **options: Any,
) -> str:
    """Writes a trained model to the folder `path`; returns the commands that load it.

    format: "peft", an adapter; "merged", a checkpoint; "split", a base and a plain LoRA for vLLM;
      "w4a16", "w8a16" and "fp8", quantized checkpoints. overwrite: replaces an earlier export.
      options: of the format, such as dtype="float32" or method="awq"; see lljax.exports.Options.

    Raises:
      ConfigError: an unknown format or option, a folder that is taken, or a model that the format
        cannot hold.
    """
    base = _base(model, "lljax.export")
    known = {field.name for field in dataclasses.fields(Options)}
    for name in options:
        one_of(*sorted(known))("lljax.export: option", name)
    _check_folder("lljax.export: path", path)
    workdir = getattr(model, "workdir", None)
    exported = Exported(
        model,
        base,
        workdir=Path(workdir) if workdir else None,
        chat_template=trained_template(Path(workdir), base) if workdir else None,
    )
    return write_export(format, exported, Path(path), Options(**options), overwrite)


def generate(
    model: Decoder,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    tokens: int = 128,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> str:
    """Continues `prompt`: a text, or the messages of a conversation, [{"role": ..., "content":
    ...}, ...].

    tokens: written at most. stop: strings that end the text as well. sampling: fields of
      lljax.generation.sample.Sampling, such as temperature=0.7; by default the likeliest token is
      taken.

    Raises:
      ConfigError: an empty prompt, or an illegal value.
    """
    base, tokenizer = _base(model, "lljax.generate"), with_template(tokenizer)
    whole(1, TOKENS)("lljax.generate: tokens", tokens)
    Several(text())("lljax.generate: stop", stop)
    names = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in sampling if name not in names]:
        raise ConfigError(
            f"lljax.generate: {unknown[0]} is none of tokens, stop, {', '.join(names)}"
        )
    ids = _prompt_tokens(tokenizer, prompt)
    room = model.spec.max_length - len(ids)
    if room < 1:
        raise ConfigError(
            f"lljax.generate: the prompt takes {len(ids):,} tokens, and the model reads "
            f"{model.spec.max_length:,}"
        )
    (completion,) = continue_prompts(
        model,
        [np.asarray(ids)],
        tokens=min(tokens, room),
        sampling=Sampling(**sampling),
        stop=end_tokens(base, tokenizer),
        stop_strings=tuple(stop),
        tokenizer=tokenizer,
        dtype=jnp.dtype(_settings(model)["model.dtype"]),
    )
    assert completion.text is not None  # it is, with a tokenizer
    return completion.text


def _prompt_tokens(tokenizer: Any, prompt: Any) -> list[int]:
    if not prompt or not isinstance(prompt, (str, list, tuple)):
        raise ConfigError(
            "lljax.generate: the prompt is a text, or a list of messages, and not empty"
        )
    if isinstance(prompt, str):
        return text_tokens(tokenizer, prompt)
    return chat_tokens(tokenizer, list(prompt))


def _check_folder(field: str, value: Any) -> None:
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    required(is_path(), "name a folder")(field, name)


def _settings(model: Decoder) -> dict[str, Any]:
    """The fields of the configuration that `prepare_model` has set, which the model carries."""
    return dict(getattr(model, "settings", ()))


def _base(model: Decoder, caller: str) -> Any:
    """The base of a model that `prepare_model` or `train` returned."""
    settings = _settings(model)
    if "model.path" not in settings:
        raise ConfigError(f"{caller}: this model is not one of lljax.prepare_model or lljax.train")
    return open_base(settings["model.path"])


def _dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `train` by their dotted names."""
    dotted = {name.replace("__", "."): value for name, value in fields.items()}
    for field in dotted:
        if field not in FIELDS:
            raise ConfigError(f"lljax.train: {unknown_field(field)}")
        if field.startswith(PREPARED):
            raise ConfigError(f"lljax.train: {field} is set by prepare_model: give it there")
    return dotted


def _configuration(settings: Mapping[str, Any], caller: str) -> Config:
    """The default configuration with these fields, each of which is checked."""
    c = default_config()
    for field, value in settings.items():
        FIELDS[field](f"{caller}: {field}", value)
    c.update_from_flattened_dict(settings)
    return c


def _adapt(model: Any, lora: dict[str, Any]) -> Decoder:
    """Attaches and initializes the adapters. lora: as `read_lora_config` returns it."""
    settings = _settings(model)
    if "lora.rank" in settings:
        raise ConfigError(
            "prepare_model: this model has adapters already: begin with prepare_model(path)"
        )
    length, factor = _target_length(model.spec, lora)
    stretch = lora["use_longlora"] and (factor != "auto" or length > model.spec.max_length)
    kind = "yarn" if stretch else "keep"
    settings |= {
        "context.rope.type": kind,
        "context.rope.factor": factor,
        **config_fields(lora, tied=model.spec.tied),
    }
    run = {
        "data.train": ("-",),
        "context.length": length,
        "context.schedule": ((1, length, "full"),),
    }
    config = _configuration(settings | run, "lora_config")
    validate(config)
    spec = stretched(model.spec, type=kind, factor=factor, length=length)
    attach_adapters(model, config)
    model.spec = spec
    if stretch:
        logging.info(
            "YaRN stretches RoPE by %g, to %s tokens", spec.rope.factor, f"{spec.max_length:,}"
        )
    _initialize(model, config)
    model.settings = (*settings.items(), ("longlora", lora["use_longlora"]))
    return model


def _target_length(spec: DecoderSpec, lora: dict[str, Any]) -> tuple[int, float | str]:
    """The tokens that the adapted model reads, and the factor of its RoPE ("auto": as needed)."""
    length, factor = lora["longlora_sequence_length"], lora["longlora_scaling_factor"] or "auto"
    if length is not None:
        return length, factor
    if factor == "auto":
        return spec.max_length, factor
    length = int(spec.rope.original_length * factor)
    if length < spec.max_length:
        raise ConfigError(
            f"lora_config: longlora_scaling_factor={factor} stretches the "
            f"{spec.rope.original_length:,} tokens that RoPE was trained for to {length:,}, and "
            f"the model reads {spec.max_length:,}: use a larger factor, or none"
        )
    return length, factor


def _initialize(model: Decoder, config: Config) -> None:
    """Gives new adapters their values, and trained weights of the base float32."""
    if starts_from_base(model):  # PiSSA, OLoRA, LoftQ: the kernels are reduced by the factors
        started = ResidualBase(open_base(config.model.path), model)
        load_weights(model, started, dtype=jnp.dtype(config.model.dtype))
        started.give_factors()
    for _, variable in declared(model):
        if variable.get_metadata("role") in config.lora.also_train:
            variable.set_value(variable.get_value().astype(jnp.float32))
    initialize(model, seed=0)
