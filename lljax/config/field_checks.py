"""Checks of the fields that have a form of their own."""

import re
from typing import Any

from lljax.config.checks import TOKENS, number, one_of, whole
from lljax.errors import ConfigError, short

_STEP, _LENGTH = whole(1), whole(2, TOKENS)
ATTENTION = one_of(owner="lljax.attention.pattern:KINDS")  # of a stage


def stage(field: str, value: Any) -> None:
    """A check: a stage of `context.schedule`, (until_step, length, attention)."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        kinds = " | ".join(map(repr, ATTENTION.all()))
        raise ConfigError(f"{field}={short(value)}: a stage is (until_step, length, {kinds})")
    until, length, attention = value
    _STEP(f"{field}: until_step", until)
    _LENGTH(f"{field}: length", length)
    ATTENTION(f"{field}: attention", attention)


def rope_factor(field: str, value: Any) -> None:
    """A check: "auto", or a number of at least 1, which the command line gives as text."""
    if isinstance(value, str) and value != "auto" and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(
                f"{field}={short(value)} is neither 'auto' nor a number of at least 1"
            ) from None
    if value != "auto":
        number(1, TOKENS)(field, value)


def lora_init(field: str, value: Any) -> None:
    """A check: the initial values of an adapter."""
    pattern = r"default|pissa|pissa_niter_[1-9]\d{0,3}|olora|loftq"
    if not (isinstance(value, str) and re.fullmatch(pattern, value)):
        raise ConfigError(
            f"{field}={short(value)} is none of default, pissa, pissa_niter_4 (or another number), "
            "olora, loftq"
        )
