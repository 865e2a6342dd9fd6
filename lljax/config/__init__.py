"""Configuration of a run: the table of fields, their rules, and the ways of giving them."""

from lljax.config.access import Config, flat, get, total_steps, warmup_steps
from lljax.config.field import Field, differs, equals
from lljax.config.rules import validate
from lljax.config.tree import (
    FIELDS,
    LEAST_HISTORY,
    default_config,
    identity,
    with_absolute_paths,
)

__all__ = [
    "FIELDS",
    "LEAST_HISTORY",
    "Config",
    "Field",
    "default_config",
    "differs",
    "equals",
    "flat",
    "get",
    "identity",
    "total_steps",
    "validate",
    "warmup_steps",
    "with_absolute_paths",
]
