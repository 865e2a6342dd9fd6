"""Values of a configuration by dotted name, and the quantities that follow from them."""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

from lljax.parallel.rounding import cdiv

# A ConfigDict with the fields of default_config; type checkers know none of its attributes.
Config: TypeAlias = Any


def get(config: Config, field: str) -> Any:
    """The value of a dotted field."""
    for part in field.split("."):
        config = config[part]
    return config


def flat(config: Config, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration, or a group of its fields, by dotted name."""
    out = {}
    for name, value in config.items():
        full = f"{prefix}{name}"
        out |= flat(value, f"{full}.") if isinstance(value, ConfigDict) else {full: value}
    return out


def total_steps(config: Config) -> int:
    """Optimizer steps of the whole run: the end of the last stage."""
    return config.context.schedule[-1][0]


def warmup_steps(optimizer: Config, steps: int) -> int:
    """Warm-up steps of a run of `steps`: `optimizer.warmup_steps`, or if that is -1 LongLoRA's 20,
    at most a step in 25."""
    return min(20, cdiv(steps, 25)) if optimizer.warmup_steps < 0 else optimizer.warmup_steps
