"""The flat YAML of a run, read into the configuration tree."""

import difflib
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from lljax.config import default_config
from lljax.errors import ConfigError

TRAIN_TYPES = {                              # what each sets, before the fields of the file
    "lora": {"lora.also_train": ()},
    "longlora": {"lora.also_train": ("embed", "norm")},
    "qlora": {"lora.also_train": (), "model.quantize": "nf4-double"},
    "full": {"train_type": "full"},
}
FIELDS = {                                   # flat name -> field of the tree
    "model": "model.path", "context_length": "context.length", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha",
    "seed": "seed", "dtype": "model.dtype", "learning_rate": "optimizer.learning_rate", "batch_size": "training.rows",
    "gradient_accumulation": "training.accumulate", "quantize": "model.quantize",
}
NESTED = {
    "scheduler": {"type": "optimizer.schedule", "warmup_steps": "optimizer.warmup_steps", "total_steps": None},
    "dataset": {"train": "data.train", "valid": "data.valid", "valid_fraction": "data.valid_fraction", "max_length": None},
}
OTHERS = ("train_type", "target_modules", "attention_impl", "sequence_parallel", "context_schedule")
ATTENTION = {"shifted_sparse": "shifted", "s2": "shifted", "shifted": "shifted", "window": "window", "full": "full"}


def read(path: str) -> ConfigDict:
    """The configuration that a YAML file describes; see README, "A run in YAML".

    In `context_schedule` a stage's `steps` is the step at which it ends. Without `attention_impl`, longlora trains its
    stages in shifted sparse attention and the last in full, and the others in full throughout.

    Raises:
      ConfigError: the file cannot be read, or a field is unknown (with the nearest name) or has an illegal value.
    """
    try:
        given = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}:{where.line + 1 if where else 1}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: not a mapping of fields to values")
    _known(path, given, (*FIELDS, *NESTED, *OTHERS))
    c = default_config()
    train_type = given.get("train_type", "lora")
    _choose(path, "train_type", train_type, TRAIN_TYPES)
    if given.get("sequence_parallel", False) not in (False, 1):
        raise ConfigError(f"{path}: sequence_parallel={given['sequence_parallel']}: a sequence is not split over devices yet")
    for field, value in TRAIN_TYPES[train_type].items():
        _set(path, c, field, field, value)
    for name, field in FIELDS.items():
        if name in given:
            _set(path, c, field, name, given[name])
    for outer, fields in NESTED.items():
        inner = given.get(outer) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {outer} is not a mapping")
        _known(path, inner, fields, f"{outer}.")
        for name, field in fields.items():
            if name in inner and field:
                value = inner[name]
                _set(path, c, field, f"{outer}.{name}", (value,) if field in ("data.train", "data.valid")
                     and isinstance(value, str) else value)
    if "target_modules" in given:
        targets = given["target_modules"]
        _set(path, c, "lora.targets", "target_modules", tuple(targets) if isinstance(targets, list) else (targets,))
    c.context.schedule = _schedule(path, given, c.context.length, train_type)
    return c


def _schedule(path, given, context_length: int, train_type: str):
    scheduler, dataset = given.get("scheduler") or {}, given.get("dataset") or {}
    total = scheduler.get("total_steps")
    stages = given.get("context_schedule")
    if stages is None:
        if not isinstance(total, int):
            raise ConfigError(f"{path}: scheduler.total_steps={total!r}: a number of steps is needed where there is no "
                              "context_schedule")
        stages = [{"max_length": dataset.get("max_length", context_length), "steps": total}]
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{path}: context_schedule is not a list of stages")
    default = ["shifted"] * (len(stages) - 1) + ["full"] if train_type == "longlora" else ["full"] * len(stages)
    named = given.get("attention_impl", None)
    if named is not None:
        _choose(path, "attention_impl", named, ATTENTION)
    out = []
    for i, stage in enumerate(stages):
        if not isinstance(stage, dict) or set(stage) != {"max_length", "steps"}:
            raise ConfigError(f"{path}: context_schedule[{i}]={stage!r}: a stage is {{max_length: tokens, steps: step at which "
                              "it ends}}")
        out.append((stage["steps"], stage["max_length"], ATTENTION[named] if named else default[i]))
    longest = dataset.get("max_length")
    if longest is not None and longest != out[-1][1]:
        raise ConfigError(f"{path}: dataset.max_length={longest} and context_schedule, whose last stage has rows of "
                          f"{out[-1][1]} tokens, differ: make them equal")
    if isinstance(total, int) and out[-1][0] != total:
        raise ConfigError(f"{path}: scheduler.total_steps={total} and context_schedule, whose last stage ends at step "
                          f"{out[-1][0]}, differ: make them equal")
    return tuple(out)


def _known(path, given: dict, allowed, prefix: str = "") -> None:
    for name in given:
        if name not in allowed:
            nearest = difflib.get_close_matches(str(name), allowed, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(allowed)}"
            raise ConfigError(f"{path}: unknown field {prefix}{name!r}: {hint}")


def _choose(path, name: str, value, allowed) -> None:
    if value not in allowed:
        raise ConfigError(f"{path}: {name}={value!r} is none of {', '.join(allowed)}")


def _set(path, c, field: str, name: str, value) -> None:
    *outer, last = field.split(".")
    for part in outer:
        c = c[part]
    try:
        c[last] = float(value) if isinstance(c[last], float) and isinstance(value, str) else \
            tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: {name}={value!r} is not a {type(c[last]).__name__}") from None
