"""The Python face: prepare a model, train it, use it."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lljax.build import attach_adapters, load_base, stretched
from lljax.config import CHECKS, default_config, validate
from lljax.config.checks import TOKENS, flag, number, one_of, required, several, text, whole
from lljax.config.checks import path as is_path
from lljax.config.field_names import unknown_field
from lljax.data.template import with_template
from lljax.errors import ConfigError, short
from lljax.generation.generate import generate as continue_prompts
from lljax.generation.prompt import chat_tokens, text_tokens
from lljax.generation.sample import Sampling
from lljax.hardware.host_memory import set_pinned_limit
from lljax.interop.adapter_init import StartedBase, starts_from_base
from lljax.interop.export import FORMATS
from lljax.interop.huggingface import load_weights
from lljax.interop.open import end_tokens, open_base
from lljax.models import spec as specs
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.models.quantize import FORMS
from lljax.run import loop
from lljax.run.restore import trained_template

# The fields of `lora_config` that are used, and their defaults.
LORA_CONFIG = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": None,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "rank_pattern": None,
    "alpha_pattern": None,
    "modules_to_save": None,
    "ensure_weight_tying": False,
    "task_type": None,
    "peft_type": "LORA",
    "use_longlora": False,
    "longlora_sequence_length": None,
    "longlora_scaling_factor": None,
}
# Fields of peft.LoraConfig that describe where an adapter is from and change nothing ...
DESCRIBES = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision")
# ... and fields that are not supported, with the value that means "not used".
NOT_USED = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": False,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    **dict.fromkeys(
        (
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "megatron_config",
            "loftq_config",
            "trainable_token_indices",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "layer_replication",
            "runtime_config",
            "lora_bias",
            "target_parameters",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        )
    ),
}
SAVED = {"embed_tokens": "embed", "lm_head": "head", "norm": "norm"}  # modules_to_save by role
PREPARED = ("model.", "lora.", "context.rope.", "context.length", "train_type")


def prepare_model(model, lora_config=None, *, dtype: str = "float32", quantize: str = "none"):
    """`prepare_model(path)` -> (model, tokenizer).
    `prepare_model(model, lora_config)` -> the model with adapters.

    path: a hub id, a folder, or a GGUF file. quantize: as `model.quantize`.
    lora_config: a peft.LoraConfig, or a mapping of its fields. Used are r, lora_alpha,
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
        return _adapt(model, _read(lora_config))
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(
            "prepare_model takes a path, or a model from prepare_model(path) and a lora_config"
        )
    one_of("float32", "bfloat16")("prepare_model: dtype", dtype)
    one_of("none", *FORMS)("prepare_model: quantize", quantize)
    set_pinned_limit()
    path = os.fspath(model)
    CHECKS["model.path"]("prepare_model: path", path)
    base = open_base(path)
    decoder = load_base(base, specs.from_hf(base.config), jnp.dtype(dtype), quantize)
    decoder.settings = (("model.path", path), ("model.dtype", dtype), ("model.quantize", quantize))
    if lora_config is not None:
        decoder = _adapt(decoder, _read(lora_config))
    return decoder, base.tokenizer()


def train(
    model: Decoder, *, data, workdir, steps: int, length: int | None = None, **fields
) -> Decoder:
    """Trains a prepared model on JSONL `data` for `steps`; the same script again resumes.

    data: a file, a folder, or several. length: tokens a row, by default all that the model reads.
    A LongLoRA model trains in shifted attention for the first three quarters of the steps, then
    in full attention. fields: further fields of the configuration, by their dotted names with "__"
    for ".", for example optimizer__learning_rate=1e-4.

    Returns: the trained model. The arrays of `model` are given away.

    Raises:
      ConfigError: a model without adapters, an unknown field or an illegal value; and what
        lljax.run.loop.train raises.
    """
    settings = dict(getattr(model, "settings", ()))
    if "lora.rank" not in settings:
        raise ConfigError(
            "lljax.train: this model has no adapters: model, tokenizer = "
            "lljax.prepare_model(path), then model = lljax.prepare_model(model, "
            "lora_config)"
        )
    _folder("lljax.train: workdir", workdir)
    whole(1)("lljax.train: steps", steps)
    length = model.spec.max_length if length is None else length
    whole(2, TOKENS)("lljax.train: length", length)
    bulk = 3 * steps // 4 if settings.pop("longlora") else 0
    schedule = ((bulk, length, "shifted"),) if bulk else ()
    files = data if isinstance(data, (tuple, list)) else (data,)
    settings |= {
        "data.train": tuple(os.fspath(f) if isinstance(f, os.PathLike) else f for f in files),
        "alarm.stall_minutes": 0.0,  # here the user can interrupt what hangs
        "context.length": model.spec.max_length,
        "context.schedule": (*schedule, (steps, length, "full")),
    }
    for name, value in fields.items():
        field = name.replace("__", ".")
        if field not in CHECKS:
            raise ConfigError(f"lljax.train: {unknown_field(field)}")
        if field.startswith(PREPARED):
            raise ConfigError(f"lljax.train: {field} is settled by prepare_model: give it there")
        settings[field] = value
    c = _configuration(settings, "lljax.train")
    from lljax.evaluation.eval_hook import make_eval_hook

    trained = loop.train(c, workdir, model=model, examiner=make_eval_hook)
    trained.workdir = str(workdir)
    return trained


def export(
    model: Decoder, path, *, format: str = "peft", dtype: str | None = None, overwrite: bool = False
) -> str:
    """Writes a trained model to the folder `path` for PyTorch; returns the commands that load it.

    format: "peft", an adapter; "merged", a checkpoint; "split", a base and a plain LoRA for vLLM.
      dtype: of the weights of the last two, by default the base's. overwrite: replaces an earlier
      export.

    Raises:
      ConfigError: an unknown format or dtype, a folder that is taken, or a model that the format
        cannot hold.
    """
    base = _base(model, "lljax.export")
    one_of(*FORMATS)("lljax.export: format", format)
    _folder("lljax.export: path", path)
    workdir = getattr(model, "workdir", None)
    template = trained_template(Path(workdir), base) if workdir else None
    return FORMATS[format](
        model, base, Path(path), dtype=dtype, overwrite=overwrite, chat_template=template
    )


def generate(
    model: Decoder, tokenizer, prompt, *, tokens: int = 128, stop: tuple[str, ...] = (), **sampling
) -> str:
    """Continues `prompt`: a text, or the messages of a conversation, [{"role": ..., "content":
    ...}, ...].

    tokens: at most this many are written. stop: strings that end the text as well. sampling: fields
      of lljax.generation.sample.Sampling, such as temperature=0.7; by default the likeliest token
      is taken.

    Raises:
      ConfigError: an empty prompt, or an illegal value.
    """
    base, tokenizer = _base(model, "lljax.generate"), with_template(tokenizer)
    whole(1, TOKENS)("lljax.generate: tokens", tokens)
    several(text())("lljax.generate: stop", stop)
    if not prompt or not isinstance(prompt, (str, list, tuple)):
        raise ConfigError(
            "lljax.generate: the prompt is a text, or a list of messages, and not empty"
        )
    ids = (
        text_tokens(tokenizer, prompt)
        if isinstance(prompt, str)
        else chat_tokens(tokenizer, prompt)
    )
    room = model.spec.max_length - len(ids)
    if room < 1:
        raise ConfigError(
            f"lljax.generate: the prompt takes {len(ids):,} tokens, and the model reads "
            f"{model.spec.max_length:,}"
        )
    names = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in sampling if name not in names]:
        raise ConfigError(
            f"lljax.generate: {unknown[0]} is none of tokens, stop, {', '.join(names)}"
        )
    (completion,) = continue_prompts(
        model,
        [np.asarray(ids)],
        tokens=min(tokens, room),
        sampling=Sampling(**sampling),
        stop=end_tokens(base, tokenizer),
        stop_strings=tuple(stop),
        tokenizer=tokenizer,
        dtype=jnp.dtype(dict(model.settings)["model.dtype"]),
    )
    return completion.text


def _folder(field: str, value) -> None:
    required(is_path(), "name a folder")(
        field, os.fspath(value) if isinstance(value, os.PathLike) else value
    )


def _base(model: Decoder, who: str):
    """The base of a model of `prepare_model`."""
    settings = dict(getattr(model, "settings", ()))
    if "model.path" not in settings:
        raise ConfigError(f"{who}: this model is not one of lljax.prepare_model or lljax.train")
    return open_base(settings["model.path"])


def _configuration(settings: Mapping, who: str):
    """The default configuration with these fields, each of which is checked."""
    c = default_config()
    for field, value in settings.items():
        CHECKS[field](f"{who}: {field}", value)
    c.update_from_flattened_dict(settings)
    return c


def _read(lora_config) -> dict:
    """The used fields of a lora_config; raises ConfigError for what is not supported."""
    defaults = NOT_USED
    if isinstance(lora_config, Mapping):
        given = dict(lora_config)
    elif dataclasses.is_dataclass(lora_config) and not isinstance(lora_config, type):
        given = {f.name: getattr(lora_config, f.name) for f in dataclasses.fields(lora_config)}
        defaults = NOT_USED | _defaults(lora_config)  # of whatever version of PEFT it is
    else:
        raise ConfigError(
            f"lora_config={short(lora_config)} is neither a mapping nor a peft.LoraConfig"
        )
    c = LORA_CONFIG | {name: value for name, value in given.items() if name in LORA_CONFIG}
    for name, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        if c[name] is not None and getattr(c[name], "value", c[name]) != only:
            raise ConfigError(f"lora_config: {name}={short(c[name])}: only {only} is trained here")
    for name in given.keys() - LORA_CONFIG.keys() - set(DESCRIBES):
        _check_unused(name, given[name], defaults)
    for name in ("use_longlora", "ensure_weight_tying"):
        flag()(f"lora_config: {name}", c[name])
    for name, check in (
        ("longlora_sequence_length", whole(2, TOKENS)),
        ("longlora_scaling_factor", number(1, TOKENS)),
    ):
        if c[name] is None:
            continue
        if not c["use_longlora"]:
            raise ConfigError(f"lora_config: {name}={short(c[name])} needs use_longlora=True")
        check(f"lora_config: {name}", c[name])
    return c


def _defaults(config) -> dict:
    """The defaults of the fields of a dataclass."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }


def _check_unused(name, value, defaults: Mapping) -> None:
    if name not in defaults:
        nearest = difflib.get_close_matches(str(name), LORA_CONFIG, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(LORA_CONFIG)}"
        raise ConfigError(f"lora_config: unknown field {short(name)}: {hint}")
    empty = isinstance(value, (Mapping, list, tuple, set, str)) and not value
    if not (value is None or value is False or empty or value == defaults[name]):
        raise ConfigError(
            f"lora_config: {name}={short(value)} is not supported: leave it at {defaults[name]!r}"
        )


def _adapt(model: Decoder, c: dict) -> Decoder:
    settings = dict(getattr(model, "settings", ()))
    if "lora.rank" in settings:
        raise ConfigError(
            "prepare_model: this model has adapters already: begin with prepare_model(path)"
        )
    length, factor = c["longlora_sequence_length"], c["longlora_scaling_factor"] or "auto"
    if length is None and factor == "auto":
        length = model.spec.max_length
    elif length is None:
        length = int(model.spec.rope.original_length * factor)
        if length < model.spec.max_length:
            raise ConfigError(
                f"lora_config: longlora_scaling_factor={factor} stretches the "
                f"{model.spec.rope.original_length:,} tokens that RoPE was trained "
                f"for to {length:,}, and the model reads {model.spec.max_length:,}: "
                "use a larger factor, or none"
            )
    stretch = c["use_longlora"] and (factor != "auto" or length > model.spec.max_length)
    kind = "yarn" if stretch else "keep"
    settings |= {"context.rope.type": kind, "context.rope.factor": factor, **_lora_fields(c, model)}
    config = _configuration(
        settings
        | {
            "data.train": ("-",),
            "context.length": length,
            "context.schedule": ((1, length, "full"),),
        },
        "lora_config",
    )
    validate(config)
    spec = stretched(model.spec, type=kind, factor=factor, length=length)
    attach_adapters(model, config)
    model.spec = spec
    if stretch:
        logging.info(
            "YaRN stretches RoPE by %g, to %s tokens", spec.rope.factor, f"{spec.max_length:,}"
        )
    if starts_from_base(model):  # the kernels keep what the factors do not take
        started = StartedBase(open_base(config.model.path), model)
        load_weights(model, started, dtype=jnp.dtype(config.model.dtype))
        started.give_factors()
    for _, variable in declared(model):
        if variable.get_metadata("role") in config.lora.also_train:
            variable.set_value(variable.get_value().astype(jnp.float32))
    initialise(model, seed=0)
    model.settings = (*settings.items(), ("longlora", c["use_longlora"]))
    return model


def _lora_fields(c: dict, model: Decoder) -> dict:
    """The fields of `config.lora` for a lora_config."""
    targets, init = c["target_modules"], c["init_lora_weights"]
    if targets is None:
        targets = default_config().lora.targets
    if isinstance(targets, (set, frozenset)):
        targets = sorted(targets, key=str)  # the order of a set changes with the process
    if init is not True and (not isinstance(init, str) or init in ("gaussian", "default")):
        raise ConfigError(
            f"lora_config: init_lora_weights={short(init)} is not supported: use "
            "True, 'pissa', 'pissa_niter_4' (or another number), 'olora' or 'loftq'"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(c[name] or {}, Mapping):
            raise ConfigError(
                f"lora_config: {name}={short(c[name])} is not a mapping of names to numbers"
            )
    return {
        "lora.rank": c["r"],
        "lora.alpha": c["lora_alpha"],
        "lora.dropout": c["lora_dropout"],
        "lora.rslora": c["use_rslora"],
        "lora.dora": c["use_dora"],
        "lora.init": "default" if init is True else init,
        "lora.rank_pattern": tuple((c["rank_pattern"] or {}).items()),
        "lora.alpha_pattern": tuple((c["alpha_pattern"] or {}).items()),
        "lora.targets": tuple(targets) if isinstance(targets, (list, tuple)) else (targets,),
        "lora.also_train": _also_train(c, model),
    }


def _also_train(c: dict, model: Decoder) -> tuple[str, ...]:
    """The roles that modules_to_save and use_longlora name."""
    saved = c["modules_to_save"] or ()
    saved = saved if isinstance(saved, (list, tuple, set)) else (saved,)
    roles = {"embed", "norm"} if c["use_longlora"] else set()
    for name in saved:
        if not isinstance(name, str) or name not in SAVED:
            raise ConfigError(
                f"lora_config: modules_to_save: {short(name)} is none of "
                f"{', '.join(SAVED)} ('norm' names every norm, as in PEFT)"
            )
        roles.add(SAVED[name])
    if model.spec.tied and {"embed_tokens", "lm_head"} & set(saved):
        if not c["ensure_weight_tying"]:
            logging.warning(
                "modules_to_save: embed_tokens and lm_head are one table in this "
                "model, and train as one"
            )
        roles = roles - {"head"} | {"embed"}
    return tuple(sorted(roles))
