"""The flat YAML of a run, read into the configuration tree."""

import contextlib
import difflib
import logging
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from lljax.config.field_names import ALSO_CALLED
from lljax.config.tree import CHECKS, default_config, get
from lljax.errors import ConfigError, first_line, short

TRAIN_TYPES = {  # what each sets, before the fields of the file
    "lora": {"lora.also_train": ()},
    "longlora": {"lora.also_train": ("embed", "norm")},
    "qlora": {"lora.also_train": (), "model.quantize": "nf4-double"},
    "full": {"train_type": "full"},
}
FIELDS = {  # flat name -> field of the tree
    "model": "model.path",
    "context_length": "context.length",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "seed": "seed",
    "dtype": "model.dtype",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "training.rows",
    "gradient_accumulation": "training.accumulate",
    "quantize": "model.quantize",
}
NESTED = {
    "scheduler": {
        "type": "optimizer.schedule",
        "warmup_steps": "optimizer.warmup_steps",
        "total_steps": None,
    },
    "dataset": {
        "train": "data.train",
        "valid": "data.valid",
        "valid_fraction": "data.valid_fraction",
        "max_length": None,
    },
    "rope": {"type": "context.rope.type", "factor": "context.rope.factor"},
}
OTHERS = ("train_type", "target_modules", "attention_impl", "sequence_parallel", "context_schedule")
ATTENTION = {
    "shifted_sparse": "shifted",
    "s2": "shifted",
    "shifted": "shifted",
    "window": "window",
    "full": "full",
}
# Names of kernels choose nothing: lljax takes the best kernel for the device and the mask.
KERNELS = (
    "auto",
    "eager",
    "sdpa",
    "flex_attention",
    "xformers",
    "flash_attn",
    "flash_attention",
    "flash_attn2",
    "flash_attention_2",
    "fa2",
    "flash_attn3",
    "flash_attention_3",
    "fa3",
    "flash_attn4",
    "flash_attention_4",
    "fa4",
)


def read(path: str) -> ConfigDict:
    """The configuration that a YAML file describes; see README, "A run in YAML".

    In `context_schedule` a stage's `steps` is the step at which it ends. Without `attention_impl`,
    or if it names a kernel, longlora trains its last stage in full attention and the others in
    shifted sparse attention; the other train types train in full attention.

    Raises:
      ConfigError: the file cannot be read, or a field is unknown (names the nearest) or illegal.
    """
    given = _mapping(path)
    _known(path, given, (*FIELDS, *NESTED, *OTHERS))
    c = default_config()
    train_type = given.get("train_type", "lora")
    _choose(path, "train_type", train_type, TRAIN_TYPES)
    for field, value in TRAIN_TYPES[train_type].items():
        _set(path, c, field, field, value)
    for name, field in FIELDS.items():
        if name in given:
            _set(path, c, field, name, given[name])
    for outer, fields in NESTED.items():
        inner = given.get(outer) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {outer}={short(inner)} is not a mapping")
        _known(path, inner, fields, f"{outer}.")
        for name, field in fields.items():
            if name in inner and field:
                _set(path, c, field, f"{outer}.{name}", inner[name])
    if "target_modules" in given:
        _set(path, c, "lora.targets", "target_modules", given["target_modules"])
    _spread_tokens(path, c, given.get("sequence_parallel", False))
    schedule = _schedule(path, given, c.context.length, train_type)
    _set(path, c, "context.schedule", "context_schedule", schedule)
    return c


def _mapping(path: str) -> dict:
    try:
        given = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = where.line + 1 if where else 1
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}:{line}: not YAML ({reason})") from None
    except RecursionError:
        raise ConfigError(f"{path}: not the YAML of a run (nested too deep)") from None
    except ValueError as error:  # no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path}: not YAML ({first_line(error)})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: not a mapping of fields to values")
    return given


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice: YAML would take the last one in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{short(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _spread_tokens(path, c: ConfigDict, value) -> None:
    """`sequence_parallel`: true spreads the tokens of a row over all devices, n over n of them."""
    if not isinstance(value, bool) and not (isinstance(value, int) and value >= 1):
        raise ConfigError(
            f"{path}: sequence_parallel={short(value)} is neither true, false nor a "
            "number of devices"
        )
    if value is True:
        c.mesh.sequence, c.mesh.fsdp = -1, 1
    elif value:
        _set(path, c, "mesh.sequence", "sequence_parallel", value)


def _schedule(path, given, context_length: int, train_type: str) -> tuple:
    scheduler, dataset = given.get("scheduler") or {}, given.get("dataset") or {}
    total, longest = scheduler.get("total_steps"), dataset.get("max_length")
    stages = given.get("context_schedule")
    if stages is None:
        if total is None:
            raise ConfigError(
                f"{path}: scheduler.total_steps: a number of steps is needed where "
                "there is no context_schedule"
            )
        stages = [{"max_length": context_length if longest is None else longest, "steps": total}]
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{path}: context_schedule={short(stages)} is not a list of stages")
    kinds = ["full"] * len(stages)
    if train_type == "longlora":
        kinds[:-1] = ["shifted"] * (len(stages) - 1)
    if "attention_impl" in given:
        named = given["attention_impl"]
        if isinstance(named, str) and _plain(named) in map(_plain, KERNELS):
            logging.info(
                "%s: attention_impl=%s: lljax takes the best kernel for the device", path, named
            )
        else:
            _choose(path, "attention_impl", named, (*ATTENTION, *KERNELS))
            kinds = [ATTENTION[named]] * len(stages)
    out = []
    for i, (stage, kind) in enumerate(zip(stages, kinds)):
        if not isinstance(stage, dict) or set(stage) != {"max_length", "steps"}:
            raise ConfigError(
                f"{path}: context_schedule[{i}]={short(stage)}: a stage is "
                "{max_length: tokens, steps: step at which it ends}"
            )
        out.append((stage["steps"], stage["max_length"], kind))
    if longest is not None and longest != out[-1][1]:
        raise ConfigError(
            f"{path}: dataset.max_length={short(longest)} and context_schedule, whose"
            f" last stage has rows of {short(out[-1][1])} tokens, differ: make them "
            "equal"
        )
    if total is not None and out[-1][0] != total:
        raise ConfigError(
            f"{path}: scheduler.total_steps={short(total)} and context_schedule, "
            f"whose last stage ends at step {short(out[-1][0])}, differ: make them equal"
        )
    return tuple(out)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _known(path, given: dict, allowed, prefix: str = "") -> None:
    for name in given:
        if name not in allowed:
            nearest = _meant(name, allowed) if isinstance(name, str) else None
            hint = f"did you mean {nearest!r}?" if nearest else f"there are {', '.join(allowed)}"
            full = f"{prefix}{name}" if prefix else name
            raise ConfigError(f"{path}: unknown field {short(full)}: {hint}")


def _meant(name: str, allowed) -> str | None:
    """The YAML field that another trainer calls `name`, or the one with the nearest spelling."""
    called = {
        field: f"{outer}.{inner}"
        for outer, fields in NESTED.items()
        for inner, field in fields.items()
    }
    called |= {field: flat for flat, field in FIELDS.items()}
    called |= {
        "context.schedule": "scheduler.total_steps",
        "mesh.sequence": "sequence_parallel",
        "lora.targets": "target_modules",
        None: None,
    }
    nearest = difflib.get_close_matches(name, allowed, 1)
    return called.get(ALSO_CALLED.get(name.lower())) or (nearest[0] if nearest else None)


def _choose(path, name: str, value, allowed) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{path}: {name}={short(value)} is none of {', '.join(allowed)}")


def _set(path, c, field: str, name: str, value) -> None:
    """Checks and sets a field; name: what the file calls it."""
    default = get(c, field)
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    elif isinstance(default, float) and isinstance(value, str) and len(value) < 40:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 2e-4 as a text
    try:
        CHECKS[field](name, value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    outer, _, last = field.rpartition(".")
    (get(c, outer) if outer else c)[last] = value
