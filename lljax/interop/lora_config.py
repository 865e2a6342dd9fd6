"""`lora_config` of lljax.prepare_model: a peft.LoraConfig, or a mapping of its fields and of three
that LongLoRA adds.
"""

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from typing import Any

from lljax.config import default_config
from lljax.config.checks import TOKENS, flag, number, whole
from lljax.errors import ConfigError, short

# The fields that are used, and their defaults.
FIELDS = {
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
# Fields of peft.LoraConfig that name the origin of an adapter and change nothing.
DESCRIPTIVE = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision")
# Fields that are not supported, with the value that means "not used".
UNSUPPORTED = {
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


def read_lora_config(lora_config: Any) -> dict[str, Any]:
    """The fields of FIELDS, with their defaults.

    Raises:
      ConfigError: an unknown field, or one that is not supported and not at its default.
    """
    given, defaults = _given(lora_config)
    c = FIELDS | {name: value for name, value in given.items() if name in FIELDS}
    for name, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        if c[name] is not None and getattr(c[name], "value", c[name]) != only:
            raise ConfigError(f"lora_config: {name}={short(c[name])}: only {only} is trained here")
    for name in given.keys() - FIELDS.keys() - set(DESCRIPTIVE):
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


def _given(lora_config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a lora_config, and the defaults of the fields that are not supported."""
    if isinstance(lora_config, Mapping):
        return dict(lora_config), UNSUPPORTED
    if dataclasses.is_dataclass(lora_config) and not isinstance(lora_config, type):
        names = [field.name for field in dataclasses.fields(lora_config)]
        given = {name: getattr(lora_config, name) for name in names}
        return given, UNSUPPORTED | _defaults(lora_config)  # of the installed version of PEFT
    raise ConfigError(
        f"lora_config={short(lora_config)} is neither a mapping nor a peft.LoraConfig"
    )


def _defaults(config: Any) -> dict[str, Any]:
    """The defaults of the fields of a dataclass."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(config)
    }


def _check_unused(name: str, value: Any, defaults: Mapping) -> None:
    if name not in defaults:
        nearest = difflib.get_close_matches(str(name), FIELDS, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(FIELDS)}"
        raise ConfigError(f"lora_config: unknown field {short(name)}: {hint}")
    empty = isinstance(value, (Mapping, list, tuple, set, str)) and not value
    if not (value is None or value is False or empty or value == defaults[name]):
        raise ConfigError(
            f"lora_config: {name}={short(value)} is not supported: leave it at {defaults[name]!r}"
        )


def config_fields(c: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The fields of `config.lora` for the result of `read_lora_config`.

    tied: whether the embeddings of the model are also its head.

    Raises:
      ConfigError: an initialization, a pattern or a module that is not supported.
    """
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
        "lora.also_train": _also_train(c, tied),
    }


def _also_train(c: dict[str, Any], tied: bool) -> tuple[str, ...]:
    """The roles of weights that modules_to_save and use_longlora name."""
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
    if tied and {"embed_tokens", "lm_head"} & set(saved):
        if not c["ensure_weight_tying"]:
            logging.warning(
                "modules_to_save: embed_tokens and lm_head are one table in this "
                "model, and train as one"
            )
        roles = roles - {"head"} | {"embed"}
    return tuple(sorted(roles))
