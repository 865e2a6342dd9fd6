"""The flat YAML of a run, read into the configuration tree."""

import contextlib
import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lljax.config import yaml_rlhf
from lljax.config.access import Config, get
from lljax.config.field_checks import ATTENTION
from lljax.config.field_names import also_called
from lljax.config.tree import FIELDS, default_config
from lljax.errors import ConfigError, first_line, short

TRAIN_TYPES = {  # the fields that each sets, before the fields of the file
    "lora": {"lora.also_train": ()},
    "longlora": {"lora.also_train": ("embed", "norm")},
    "qlora": {"lora.also_train": (), "model.quantize": "nf4-double"},
    "full": {"train_type": "full"},
}
# Names that are no config field: the schedule, and settings of several fields.
SCHEDULE = ("scheduler.total_steps", "dataset.max_length", "context_schedule", "attention_impl")
OTHERS = ("train_type", "sequence_parallel", *SCHEDULE, *yaml_rlhf.NAMES)
OTHER_NAMES = {  # ... by the config field that they set
    "context.schedule": "scheduler.total_steps",
    "mesh.sequence": "sequence_parallel",
    "objective.name": "rlhf_type",
    "reward.functions": "reward_funcs",
}
OTHER_KINDS = {"shifted_sparse": "shifted", "s2": "shifted"}  # of attention
# Names of kernels choose nothing: lljax takes the best kernel for the device and the mask.
# fmt: off
KERNELS = (
    "auto", "eager", "sdpa", "flex_attention", "xformers", "flash_attn", "flash_attention",
    "flash_attn2", "flash_attention_2", "fa2", "flash_attn3", "flash_attention_3", "fa3",
    "flash_attn4", "flash_attention_4", "fa4",
)
# fmt: on


def read(path: str) -> Config:
    """The configuration that a YAML file describes; see lljax/config/README.md.

    In `context_schedule` a stage's `steps` is the step at which it ends. Without `attention_impl`,
    or if it names a kernel, longlora trains its last stage in full attention and the others in
    shifted sparse attention; the other train types train in full attention.

    Raises:
      ConfigError: the file cannot be read, or a field is unknown (names the nearest) or illegal.
    """
    given = _flattened(path, _mapping(path))
    c = default_config()
    train_type = given.get("train_type", "lora")
    _choose(path, "train_type", train_type, TRAIN_TYPES)
    for field, value in TRAIN_TYPES[train_type].items():
        _set(path, c, field, field, value)
    yaml_rlhf.set_objective(path, c, given)
    for field in FIELDS.values():
        if field.yaml in given:
            _set(path, c, field.name, field.yaml, given[field.yaml])
    _spread_tokens(path, c, given.get("sequence_parallel", False))
    schedule = _schedule(path, given, c.context.length, train_type)
    _set(path, c, "context.schedule", "context_schedule", schedule)
    return c


def _names() -> tuple[str, ...]:
    """All names of the flat YAML; names in a nested mapping are dotted."""
    return (*(field.yaml for field in FIELDS.values() if field.yaml), *OTHERS)


def _flattened(path: str, given: dict) -> dict[str, Any]:
    """The values of a file by name; names in a nested mapping are dotted."""
    names = _names()
    groups: dict[str, list[str]] = {}  # the names in each nested mapping
    for name in names:
        outer, _, inner = name.rpartition(".")
        if outer:
            groups.setdefault(outer, []).append(inner)
    top = [name for name in names if "." not in name]
    _known(path, given, (*top, *groups))
    flat = {name: value for name, value in given.items() if name not in groups}
    for outer, members in groups.items():
        inner = given.get(outer) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {outer}={short(inner)} is not a mapping")
        _known(path, inner, members, f"{outer}.")
        flat |= {f"{outer}.{name}": value for name, value in inner.items()}
    return flat


def _mapping(path: str) -> dict:
    try:
        given = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
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
    """Refuses a field that is given twice; YAML would silently take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{short(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _spread_tokens(path: str, c: Config, value: Any) -> None:
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


def _schedule(path: str, given: dict, context_length: int, train_type: str) -> tuple:
    """The stages (until_step, length, attention)."""
    total, longest = given.get("scheduler.total_steps"), given.get("dataset.max_length")
    stages = given.get("context_schedule")
    if stages is None:
        if total is None:
            raise ConfigError(
                f"{path}: scheduler.total_steps: a number of steps is needed if there is no "
                "context_schedule"
            )
        stages = [{"max_length": context_length if longest is None else longest, "steps": total}]
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{path}: context_schedule={short(stages)} is not a list of stages")
    out = []
    kinds = _attention(path, given, train_type, len(stages))
    for index, (stage, kind) in enumerate(zip(stages, kinds, strict=True)):
        if not isinstance(stage, dict) or set(stage) != {"max_length", "steps"}:
            raise ConfigError(
                f"{path}: context_schedule[{index}]={short(stage)}: a stage is "
                "{max_length: tokens, steps: step at which it ends}"
            )
        out.append((stage["steps"], stage["max_length"], kind))
    steps, length, _ = out[-1]
    if longest is not None and longest != length:
        raise ConfigError(
            f"{path}: dataset.max_length={short(longest)} and context_schedule, whose last stage "
            f"has rows of {short(length)} tokens, differ: make them equal"
        )
    if total is not None and steps != total:
        raise ConfigError(
            f"{path}: scheduler.total_steps={short(total)} and context_schedule, whose last stage "
            f"ends at step {short(steps)}, differ: make them equal"
        )
    return tuple(out)


def _attention(path: str, given: dict, train_type: str, stages: int) -> list[str]:
    """The attention of each stage."""
    named = given.get("attention_impl", KERNELS[0])
    if isinstance(named, str) and _plain(named) in map(_plain, KERNELS):
        if "attention_impl" in given:
            logging.info(
                "%s: attention_impl=%s: lljax takes the best kernel for the device", path, named
            )
        earlier = "shifted" if train_type == "longlora" else "full"
        return [earlier] * (stages - 1) + ["full"]
    _choose(path, "attention_impl", named, (*OTHER_KINDS, *ATTENTION.all(), *KERNELS))
    return [OTHER_KINDS.get(named, named)] * stages


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _known(path: str, given: dict, allowed: Iterable[str], prefix: str = "") -> None:
    """Raises ConfigError for a name in `given` that is not allowed."""
    for name in given:
        if name not in allowed:
            nearest = _nearest_name(name, allowed) if isinstance(name, str) else None
            hint = f"did you mean {nearest!r}?" if nearest else f"there are {', '.join(allowed)}"
            full = f"{prefix}{name}" if prefix else name
            raise ConfigError(f"{path}: unknown field {short(full)}: {hint}")


def _nearest_name(name: str, allowed: Iterable[str]) -> str | None:
    """The YAML field that another trainer calls `name`, or the one with the nearest spelling."""
    by_field = OTHER_NAMES | {field.name: field.yaml for field in FIELDS.values() if field.yaml}
    nearest = difflib.get_close_matches(name, allowed, 1)
    return by_field.get(also_called().get(name.lower(), "")) or (nearest[0] if nearest else None)


def _choose(path: str, name: str, value: Any, allowed: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{path}: {name}={short(value)} is none of {', '.join(allowed)}")


def _set(path: str, c: Config, field: str, name: str, value: Any) -> None:
    """Checks and sets a field; name: its name in the file."""
    default = FIELDS[field].default
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    elif isinstance(default, float) and isinstance(value, str) and len(value) < 40:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 2e-4 as a text
    try:
        FIELDS[field](name, value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    outer, _, last = field.rpartition(".")
    (get(c, outer) if outer else c)[last] = value
