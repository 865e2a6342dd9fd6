"""Configuration of a run: the tree of fields, their rules, and the ways of giving them."""

from lljax.config.tree import (
    CHECKS,
    LEAST_HISTORY,
    READS,
    Config,
    default_config,
    flat,
    get,
    total_steps,
    validate,
    warmup_steps,
    with_absolute_paths,
)

__all__ = [
    "CHECKS",
    "LEAST_HISTORY",
    "READS",
    "Config",
    "default_config",
    "flat",
    "get",
    "total_steps",
    "validate",
    "warmup_steps",
    "with_absolute_paths",
]
