"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the six ways transformers
stretches it.

One pure function per kind, after transformers `modeling_rope_utils.py`, from which the names come.
Angles are float32
throughout: at bfloat16, position 257 is already another position.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lljax.errors import ConfigError, ModelError, short
from lljax.models.values import (
    FLAG,
    LARGEST,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    SHARE,
    WORD,
    Value,
    check,
    list_of,
    optional,
    whole,
)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding and how it is stretched. Field names follow transformers' `rope_parameters`.

    `original_length` is the context, in tokens, that the frequencies were trained for. `partial`:
    share of each head that turns, its first dimensions; the others carry no position. Optional
    fields are None when the checkpoint leaves them to the formula's default.
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 2048
    partial: float = 1.0
    attention_factor: float | None = None
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # longrope
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class Frequencies(NamedTuple):
    inverse: jax.Array  # float32 [turning dimensions / 2], radians per position
    scale: float  # of sine and cosine (yarn, longrope), 1 elsewhere


class Place(NamedTuple):
    """What positions do to queries and keys in a layer: turn them; or, where there is no RoPE, at
    most lengthen queries.
    """

    rotation: tuple[jax.Array, jax.Array] | None = None  # see `rotation`
    temperature: jax.Array | None = None  # see `temperature`


def frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """The frequencies for a sequence of `length` positions (may be traced; only dynamic and
    longrope look at it) and heads of H, of which `turning` turn: that is the H of the functions
    below.
    """
    return KINDS[spec.type](spec, turning(spec, H), length)


def turning(spec: RopeSpec, H: int) -> int:
    """How many dimensions of a head of H turn."""
    return int(H * spec.partial)


def rotation(positions: jax.Array, frequencies: Frequencies) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine, float32 [B, T, turning dimensions / 2], of positions int32 [B, T]."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies.inverse
    return jnp.sin(angles) * frequencies.scale, jnp.cos(angles) * frequencies.scale


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotates x [B, T, N, H], if there is a rotation; of the dimensions that turn, the first half
    pairs with the second, as in transformers. Computed in float32.
    """
    if rotation is None:
        return x
    sin, cos = (part[:, :, None] for part in rotation)
    turned = x[..., : 2 * sin.shape[-1]]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    rest = [] if turned.shape == x.shape else [x[..., turned.shape[-1] :].astype(jnp.float32)]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, *rest], axis=-1
    ).astype(x.dtype)


def temperature(positions: jax.Array, weight: float, floor: float) -> jax.Array:
    """By how much the queries of layers without RoPE are multiplied, float32 [B, T], to keep
    attention as sharp over more keys: 1 + weight log(1 + floor((position + 1) / floor)). After
    Nakanishi 2025, arXiv 2501.19399; transformers' Llama 4.
    """
    return 1 + weight * jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / floor))


def wavelengths(theta: float, H: int) -> np.ndarray:
    """theta ** (2i / H), float32 [H / 2]: torch's to within the last bit. At position 9,000 one
    unit in the last place is already an angle of 0.001.
    """
    # as torch has it: inexact at H = 96
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    return (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)


def base_frequencies(theta: float, H: int) -> np.ndarray:
    return np.float32(1) / wavelengths(theta, H)


def default_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    return Frequencies(jnp.asarray(base_frequencies(spec.theta, H)), 1.0)


def linear_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """Position interpolation, p' = p / factor: every angle divided. Chen et al. 2023, arXiv
    2306.15595, eq. 4.
    """
    return Frequencies(jnp.asarray(base_frequencies(spec.theta, H) / np.float32(spec.factor)), 1.0)


def dynamic_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """NTK-aware: the base grows with the sequence beyond the original length.
    `_compute_dynamic_ntk_parameters`.
    """
    length = jnp.maximum(jnp.float32(length), spec.original_length)
    grown = spec.factor * length / spec.original_length - (spec.factor - 1)
    # The base is theta * grown ** (H / (H - 2)). Split so, its large part is computed in float64.
    exponent = (np.arange(0, H, 2) / (H - 2)).astype(np.float32)
    return Frequencies(base_frequencies(spec.theta, H) * grown**-exponent, 1.0)


def yarn_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """High frequencies kept, low ones interpolated, a ramp between. Peng et al. 2023, arXiv
    2309.00071, section 3.2.
    """

    def dimension(rotations):  # that turns `rotations` times over the original length
        return (
            H
            * math.log(spec.original_length / (rotations * 2 * math.pi))
            / (2 * math.log(spec.theta))
        )

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    if low == high:
        high += 0.001
    kept = 1 - np.clip((np.arange(H // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    long = wavelengths(spec.theta, H)
    inverse = 1 / (np.float32(spec.factor) * long) * (1 - kept) + 1 / long * kept

    scale = spec.attention_factor
    if scale is None and spec.mscale and spec.mscale_all_dim:
        scale = magnitude(spec, spec.mscale) / magnitude(spec, spec.mscale_all_dim)
    return Frequencies(
        jnp.asarray(inverse.astype(np.float32)), magnitude(spec, 1.0) if scale is None else scale
    )


def magnitude(spec: RopeSpec, weight: float) -> float:
    """By how much yarn lengthens queries and keys, to keep attention as sharp over more of them."""
    return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0


def llama3_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """Llama 3.1: wavelengths beyond the original length interpolated, a ramp below.
    `_compute_llama3_parameters`.
    """
    base = base_frequencies(spec.theta, H)
    turns = spec.original_length * base / (2 * np.pi)  # over the original length
    with np.errstate(divide="ignore"):  # Llama 4 has one factor for both: a step
        ramp = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept = np.clip(ramp, 0, 1).astype(np.float32)
    return Frequencies(jnp.asarray((1 - kept) * base / np.float32(spec.factor) + kept * base), 1.0)


def longrope_frequencies(spec: RopeSpec, H: int, length) -> Frequencies:
    """A searched factor per dimension, one set up to the original length and one beyond. Ding et
    al. 2024, arXiv 2402.13753; `_compute_longrope_parameters`.
    """
    factors = jnp.where(
        jnp.asarray(length) > spec.original_length,
        jnp.asarray(spec.long_factor, jnp.float32),
        jnp.asarray(spec.short_factor, jnp.float32),
    )
    scale = spec.attention_factor
    if scale is None:
        scale = (
            1.0
            if spec.factor <= 1
            else math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_length))
        )
    return Frequencies(1 / (factors * wavelengths(spec.theta, H)), scale)


KINDS = {
    "default": default_frequencies,
    "linear": linear_frequencies,
    "dynamic": dynamic_frequencies,
    "yarn": yarn_frequencies,
    "llama3": llama3_frequencies,
    "longrope": longrope_frequencies,
}
EXTENDABLE = ("linear", "dynamic", "yarn", "llama3", "longrope")
OWN = ("llama3", "longrope")  # these extend a base of the same kind alone


def extend(
    spec: RopeSpec, *, type: str, factor: float | str, length: int, max_length: int
) -> RopeSpec:
    """The RoPE of a base stretched to read `length` tokens, as `context.rope = {type, factor}`
    asks.

    "keep" leaves the RoPE of the base. The kind that the base has already keeps every field and
    changes the factor (longrope: see `longer_factors`); another kind replaces its scaling, see
    `lost`. `factor` is the new factor itself, not a multiple of the old one. It counts from the
    length that the frequencies were trained for, for llama3 and longrope from the length that a
    factor of 1 would give (Llama 3.1 reads 131,072 tokens with a factor of 8: from 16,384).
    "auto" is the least whole factor that reaches `length`, and leaves a base alone that reaches it
    already. max_length: the tokens that the base reads as it is.

    Raises:
      ConfigError: an unknown type; a factor that is no number of at least 1 or does not reach
        `length`; dynamic over a base that is scaled in another way; llama3 or longrope over a base
        that is not.
    """
    if type not in ("keep", *EXTENDABLE):
        raise ConfigError(f"context.rope.type={type!r} is none of keep, {', '.join(EXTENDABLE)}")
    if type == "keep" or (factor == "auto" and length <= max_length):
        return spec
    if type in OWN and type != spec.type:
        raise ConfigError(
            f"context.rope.type={type!r} extends a base with {type} frequencies, and "
            f"those of this base are {spec.type!r}: use yarn"
        )
    if type == "dynamic" and spec.type not in ("default", "dynamic"):
        raise ConfigError(
            "context.rope.type='dynamic' leaves short rows unscaled, and the base was "
            f"trained under {spec.type!r}: use linear or yarn"
        )
    if type == "longrope" and spec.factor <= 1:
        raise ConfigError(
            f"context.rope.type='longrope': the factor of the base is {spec.factor}, "
            "which does not tell how its long_factor grows: use yarn"
        )
    unit = max_length / spec.factor if type in OWN else spec.original_length
    least = math.ceil(length / unit)
    if factor == "auto":
        factor = least
    if not isinstance(factor, (int, float)) or not 1 <= factor <= LARGEST:
        raise ConfigError(f"context.rope.factor={short(factor)}: 'auto', or a number of at least 1")
    if factor * unit < length:
        raise ConfigError(
            f"context.rope.factor={factor} stretches {unit:.0f} tokens to "
            f"{int(factor * unit)}, short of context.length={length}: use 'auto' or "
            f"{least}"
        )
    factor = float(factor)
    if type != spec.type:
        return RopeSpec(
            type,
            theta=spec.theta,
            factor=factor,
            original_length=spec.original_length,
            partial=spec.partial,
        )
    if type == "longrope":
        return dataclasses.replace(spec, factor=factor, long_factor=longer_factors(spec, factor))
    return dataclasses.replace(spec, factor=factor)


def longer_factors(spec: RopeSpec, factor: float) -> tuple[float, ...]:
    """The `long_factor` of a longrope base at another factor.

    An entry is spec.factor ** share, from 0 (the dimension is extrapolated) to 1 (interpolated),
    and becomes factor ** share. Position interpolation (share 1) and NTK-aware scaling (share 2i /
    (H - 2)) are extended exactly; fast dimensions stay nearly as they are, which linear scaling
    would blur.
    """
    growth = math.log(factor) / math.log(spec.factor)
    return tuple(each**growth for each in spec.long_factor)


def lost(before: RopeSpec, after: RopeSpec) -> list[str]:
    """The fields of the scaling of `before`, as "name=value", that `after` of another kind
    drops.
    """
    if before.type == after.type:
        return []
    return [
        f"{name}={f'[{len(value)} numbers]' if name in LISTS else value}"
        for name, value in scaling(before).items()
    ]


def scaling(spec: RopeSpec) -> dict:
    """The fields of its scaling: those that its kind always has, and others that are set."""
    if spec.type == "default":
        return {}
    always = ("factor", *WRITTEN.get(spec.type, ()))
    return {
        name: getattr(spec, name)
        for name in SCALING
        if name in always or getattr(spec, name) != DEFAULTS[name]
    }


# Fields of `rope_parameters`, which `RopeSpec` has too, and what they may hold.
SCALING = {
    "factor": optional(NUMBER),
    "attention_factor": optional(NUMBER),
    "beta_fast": optional(NUMBER),
    "beta_slow": optional(NUMBER),
    "mscale": optional(NOT_NEGATIVE),
    "mscale_all_dim": optional(NOT_NEGATIVE),
    "truncate": FLAG,
    "low_freq_factor": optional(NUMBER),
    "high_freq_factor": optional(NUMBER),
    "short_factor": optional(list_of(NUMBER)),
    "long_factor": optional(list_of(NUMBER)),
}
LISTS = ("short_factor", "long_factor")
THETA = Value(lambda x: NUMBER.holds(x) and x > 1, "a number above 1")
FIELDS = SCALING | {
    "type": WORD,
    "rope_type": WORD,
    "rope_theta": THETA,
    "partial_rotary_factor": optional(SHARE),
    "original_max_position_embeddings": optional(whole(1)),
}
# Of a whole config.json.
TOP = {
    name: FIELDS[name]
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
}
TOP |= {
    "max_position_embeddings": whole(1),
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(RopeSpec)}
# What a kind cannot do without when it is read, and what it has whatever the value.
NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
WRITTEN = {
    "yarn": ("beta_fast", "beta_slow", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": LISTS,
}
WITH_ORIGINAL = ("yarn", "llama3", "longrope")  # these name the length they were trained for


def from_hf(hf_config: dict) -> RopeSpec:
    """Reads `rope_parameters` (transformers 5) or the legacy `rope_theta` and `rope_scaling`.

    Where both are present the legacy form wins, as it does in transformers.

    Raises:
      ModelError: an unknown kind, one without the fields it needs, a value that cannot be right, or
        a RoPE by layer type.
    """
    check(hf_config, TOP)
    given = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if any(isinstance(value, dict) and name not in FIELDS for name, value in given.items()):
        raise ModelError(
            "config.json: rope_parameters has to be one flat object, the same for every layer"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    check(given, FIELDS, f"config.json: rope_type {short(kind)}")
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in KINDS:
        raise ModelError(f"config.json: rope_type {short(kind)} is none of {', '.join(KINDS)}")
    for field in NEEDS.get(kind, ()):
        if given.get(field) is None:
            raise ModelError(f"config.json: rope_type {kind!r} needs {field!r}")

    def first(name, default):
        values = (given.get(name), hf_config.get(name), default)
        return next(value for value in values if value is not None)

    max_length = hf_config.get("max_position_embeddings", DEFAULTS["original_length"])
    original = max_length
    if kind in WITH_ORIGINAL:  # the one beside the others counts before the one in them
        original = (
            hf_config.get("original_max_position_embeddings")
            or given.get("original_max_position_embeddings")
            or max_length
        )
    common = {
        "theta": first("rope_theta", DEFAULTS["theta"]),
        "original_length": original,
        "partial": first("partial_rotary_factor", DEFAULTS["partial"]),
    }
    if kind == "default":
        return RopeSpec(**common)
    fields = {
        name: tuple(given[name]) if name in LISTS else given[name]
        for name in SCALING
        if given.get(name) is not None
    }
    if kind == "longrope":
        fields.setdefault("factor", max_length / original)
    spec = RopeSpec(kind, **common, **fields)
    if kind == "llama3" and spec.high_freq_factor < spec.low_freq_factor:
        raise ModelError(
            f"config.json: high_freq_factor={spec.high_freq_factor} is below "
            f"low_freq_factor={spec.low_freq_factor}"
        )
    return spec


def to_hf(spec: RopeSpec, max_length: int) -> dict:
    """The config.json entries of this RoPE, in the new and the legacy form, for a model that reads
    `max_length` tokens.

    vLLM multiplies `max_position_embeddings` by the factor of linear and dynamic, so there it stays
    the original; for the others it is the extended one. Factors are JSON floats: vLLM tests for the
    type. The legacy entry comes first: where these entries override a loaded config of transformers
    5, one after the other, each of the two replaces the other whole, and the new one holds
    everything. transformers 4 reads the share of the head that turns, and the original length of
    longrope, beside the legacy entry alone, and makes the factor of longrope from both lengths.
    """
    parameters = {"rope_type": spec.type, "rope_theta": float(spec.theta)}
    beside = {"rope_theta": float(spec.theta)}
    for name, value in scaling(spec).items():
        parameters[name] = list(value) if name in LISTS else value
        if name in ("factor", "attention_factor"):
            parameters[name] = float(value)
    if spec.type in WITH_ORIGINAL:
        parameters["original_max_position_embeddings"] = spec.original_length
    if spec.type in ("linear", "dynamic"):
        max_length = spec.original_length
    if spec.type == "longrope":
        beside["original_max_position_embeddings"] = spec.original_length
        max_length = max(max_length, int(spec.original_length * spec.factor))
    if spec.partial != 1:
        parameters["partial_rotary_factor"] = beside["partial_rotary_factor"] = spec.partial
    if spec.type != "default":
        beside["rope_scaling"] = dict(parameters)
    return {**beside, "rope_parameters": parameters, "max_position_embeddings": max_length}


def reach(spec: RopeSpec, max_position_embeddings: int) -> int:
    """Tokens that a model with this config.json reads (vLLM's rule, see `to_hf`).

    Of yarn the larger of both: Qwen2.5's model card adds yarn to config.json and leaves
      max_position_embeddings.
    """
    if spec.type in ("linear", "dynamic", "yarn"):
        return max(max_position_embeddings, int(spec.original_length * spec.factor))
    return max_position_embeddings
