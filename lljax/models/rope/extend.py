"""The RoPE of a base, stretched to read longer rows."""

import math

from lljax.errors import ConfigError, short
from lljax.models.rope.hf import scaling
from lljax.models.rope.kinds import EXTENDABLE, KINDS, LISTS, RopeSpec
from lljax.models.values import LARGEST


def extend(
    spec: RopeSpec, *, type: str, factor: float | str, length: int, max_length: int
) -> RopeSpec:
    """The RoPE of a base stretched to read `length` tokens; type, factor: `context.rope`.

    "keep" leaves the RoPE of the base. The kind of the base keeps every field and changes the
    factor (longrope: see `grow_longrope`); another kind replaces the scaling, see
    `dropped_fields`. `factor` is the new factor itself, not a multiple of the old one. It counts
    from the length that the frequencies were trained for; for llama3 and longrope, from the length
    that a factor of 1 would give (Llama 3.1 reads 131,072 tokens with a factor of 8: from 16,384).
    "auto" is the least whole factor that reaches `length`, and changes nothing if the base reaches
    it already. max_length: the tokens that the base reads unchanged.

    Raises:
      ConfigError: an unknown type; a factor that is no number of at least 1 or does not reach
        `length`; dynamic over a base that is scaled in another way; llama3 or longrope over a base
        that is not.
    """
    if type not in ("keep", *EXTENDABLE):
        raise ConfigError(f"context.rope.type={type!r} is none of keep, {', '.join(EXTENDABLE)}")
    if type == "keep" or (factor == "auto" and length <= max_length):
        return spec
    _check_base(spec, type)
    start = max_length / spec.factor if KINDS[type].own_base_only else spec.original_length
    factor = _factor(factor, start, length)
    if type != spec.type:
        return RopeSpec(
            type=type,
            theta=spec.theta,
            factor=factor,
            original_length=spec.original_length,
            partial=spec.partial,
        )
    return KINDS[type].grow(spec, factor)


def _check_base(spec: RopeSpec, type: str) -> None:
    """Raises ConfigError if a kind cannot extend this base."""
    kind = KINDS[type]
    if not kind.can_extend(spec.type):
        usable = (name for name in EXTENDABLE if KINDS[name].can_extend(spec.type))
        rule = (
            "cannot extend every base"
            if kind.extends == "any"
            else f"extends a base with {' or '.join(kind.extends)} frequencies"
        )
        raise ConfigError(
            f"context.rope.type={type!r} {rule}, and this base has {spec.type!r}: use "
            f"{' or '.join(usable)}"
        )


def _factor(factor: float | str, start: float, length: int) -> float:
    """The factor that stretches `start` tokens to `length`; "auto" is the least whole one."""
    least = math.ceil(length / start)
    if factor == "auto":
        factor = least
    if not isinstance(factor, (int, float)) or not 1 <= factor <= LARGEST:
        raise ConfigError(f"context.rope.factor={short(factor)}: 'auto', or a number of at least 1")
    if factor * start < length:
        raise ConfigError(
            f"context.rope.factor={factor} stretches {start:.0f} tokens to {int(factor * start)}, "
            f"short of context.length={length}: use 'auto' or {least}"
        )
    return float(factor)


def dropped_fields(before: RopeSpec, after: RopeSpec) -> list[str]:
    """The fields of the scaling of `before`, as "name=value", that another kind `after` drops."""
    if before.type == after.type:
        return []
    return [
        f"{name}={f'[{len(value)} numbers]' if name in LISTS else value}"
        for name, value in scaling(before).items()
    ]
