"""The kinds of RoPE scaling: one function per kind, in the table `KINDS`.

The functions follow transformers `modeling_rope_utils.py`, and so do the names of kinds and fields.
Frequencies are float32: at bfloat16, position 257 is already another position.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lljax.errors import ConfigError, ModelError

Length = int | jax.Array  # the number of positions of a sequence; may be traced


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding and its scaling. Field names follow transformers' `rope_parameters`.

    `original_length` is the context, in tokens, that the frequencies were trained for. `partial` is
    the share of every head that rotates, its first dimensions. An optional field is None if the
    checkpoint leaves it to the default of the formula.
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
    inverse: Float[Array, " half"]  # float32 [rotary dimensions / 2], radians per position
    scale: float  # factor of sine and cosine (yarn, longrope), else 1


def frequencies(spec: RopeSpec, head_dim: int, length: Length) -> Frequencies:
    """The frequencies of a head for a sequence of `length` positions.

    Only kinds `by_length` depend on the length.
    """
    return KINDS[spec.type].frequencies(spec, rotary_dims(spec, head_dim), length)


def rotary_dims(spec: RopeSpec, head_dim: int) -> int:
    """The number of dimensions of a head that rotate, H in the functions below."""
    return head_dim if KINDS[spec.type].whole_head else int(head_dim * spec.partial)


def wavelengths(theta: float, H: int) -> np.ndarray:
    """theta ** (2i / H), float32 [H / 2], equal to torch's within the last bit.

    At position 9,000 one unit in the last place is already an angle of 0.001.
    """
    # as torch has it: inexact at H = 96
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    return (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)


def base_frequencies(theta: float, H: int) -> np.ndarray:
    """The inverse frequencies without scaling, float32 [H / 2]."""
    return np.float32(1) / wavelengths(theta, H)


def default_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """No scaling. Su et al. 2021, arXiv 2104.09864, section 3.2.2."""
    return Frequencies(jnp.asarray(base_frequencies(spec.theta, H)), 1.0)


def linear_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """Position interpolation, p' = p / factor: divides every angle by the factor.

    Chen et al. 2023, arXiv 2306.15595, eq. 4; `_compute_linear_scaling_rope_parameters`.
    """
    return Frequencies(jnp.asarray(base_frequencies(spec.theta, H) / np.float32(spec.factor)), 1.0)


def dynamic_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """NTK-aware scaling: the base grows with the sequence beyond the original length.

    `_compute_dynamic_ntk_parameters`.
    """
    length = jnp.maximum(jnp.float32(length), spec.original_length)
    growth = spec.factor * length / spec.original_length - (spec.factor - 1)
    # The base is theta * growth ** (H / (H - 2)). Split so, its large part is computed in float64.
    exponent = (np.arange(0, H, 2) / (H - 2)).astype(np.float32)
    return Frequencies(jnp.asarray(base_frequencies(spec.theta, H) * growth**-exponent), 1.0)


def yarn_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """Keeps high frequencies, interpolates low ones, with a ramp between them.

    Peng et al. 2023, arXiv 2309.00071, section 3.2; `_compute_yarn_parameters`.
    """

    def dimension(rotations: float) -> float:
        """The dimension that rotates so many times over the original length."""
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
        scale = yarn_magnitude(spec, spec.mscale) / yarn_magnitude(spec, spec.mscale_all_dim)
    if scale is None:
        scale = yarn_magnitude(spec, 1.0)
    return Frequencies(jnp.asarray(inverse.astype(np.float32)), scale)


def yarn_magnitude(spec: RopeSpec, weight: float) -> float:
    """yarn's factor of queries and keys, which keeps attention sharp over more keys.

    Peng et al. 2023, arXiv 2309.00071, eq. 22; transformers `get_mscale`.
    """
    return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0


def llama3_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """Llama 3.1: interpolates wavelengths beyond the original length, with a ramp below.

    `_compute_llama3_parameters`.
    """
    base = base_frequencies(spec.theta, H)
    rotations = spec.original_length * base / (2 * np.pi)  # over the original length
    with np.errstate(divide="ignore"):  # Llama 4 has one factor for both: a step
        ramp = (rotations - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    kept = np.clip(ramp, 0, 1).astype(np.float32)
    return Frequencies(jnp.asarray((1 - kept) * base / np.float32(spec.factor) + kept * base), 1.0)


def longrope_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """A searched factor per dimension: one set up to the original length and one beyond.

    Ding et al. 2024, arXiv 2402.13753; `_compute_longrope_parameters`.
    """
    factors = jnp.where(
        jnp.asarray(length) > spec.original_length,
        jnp.asarray(spec.long_factor, jnp.float32),
        jnp.asarray(spec.short_factor, jnp.float32),
    )
    scale = spec.attention_factor
    if scale is None and spec.factor <= 1:
        scale = 1.0
    if scale is None:
        scale = math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_length))
    return Frequencies(1 / (factors * wavelengths(spec.theta, H)), scale)


def proportional_frequencies(spec: RopeSpec, H: int, length: Length) -> Frequencies:
    """The fastest share `spec.partial` of the pairs of the whole head, and 0 for the others, which
    do not rotate. The factor divides every angle, as in `linear_frequencies`.

    Gemma 4; `_compute_proportional_rope_parameters`.
    """
    rotates = np.arange(H // 2) < int(spec.partial * H // 2)
    inverse = np.where(rotates, base_frequencies(spec.theta, H), np.float32(0))
    return Frequencies(jnp.asarray(inverse / np.float32(spec.factor)), 1.0)


def _check_llama3(spec: RopeSpec) -> None:
    if spec.high_freq_factor < spec.low_freq_factor:
        raise ModelError(
            f"config.json: high_freq_factor={spec.high_freq_factor} is below "
            f"low_freq_factor={spec.low_freq_factor}"
        )


def _with_factor(spec: RopeSpec, factor: float) -> RopeSpec:
    return dataclasses.replace(spec, factor=factor)


def grow_longrope(spec: RopeSpec, factor: float) -> RopeSpec:
    """A longrope base at another factor, with a `long_factor` that fits.

    An entry is spec.factor ** share, from 0 (the dimension is extrapolated) to 1 (interpolated),
    and becomes factor ** share. This extends position interpolation (share 1) and NTK-aware scaling
    (share 2i / (H - 2)) exactly; fast dimensions stay nearly unchanged, which linear scaling would
    blur.

    Raises:
      ConfigError: the factor of the base is at most 1.
    """
    if spec.factor <= 1:
        raise ConfigError(
            f"context.rope.type={spec.type!r}: the factor of the base is {spec.factor}, "
            "which does not say how its long_factor grows: use yarn"
        )
    growth = math.log(factor) / math.log(spec.factor)
    long_factor = tuple(entry**growth for entry in spec.long_factor)
    return dataclasses.replace(spec, factor=factor, long_factor=long_factor)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of scaling: everything that is particular to it.

    frequencies(spec, H, length): the formula. by_length: it depends on the length of the sequence,
      and rows of different lengths cannot share a batch in generation.
    scales: False if it has no fields besides theta and the rotary share.
    whole_head: `RopeSpec.partial` chooses pairs of the whole head, of which dimension i pairs with
      i + H / 2; otherwise it is the first dimensions, paired among themselves. No other kind can
      extend such a base.

    config.json:
      other_names: older names of the kind.
      required: fields that the file must have. written: fields that are always written to it;
        others only if they are set. lists: fields with one number per rotated pair.
      check(spec): raises ModelError if the fields contradict each other.
      names_original: the file names the length that the frequencies were trained for; otherwise
        that is max_position_embeddings.
      factor_from_lengths: the file may leave out the factor, which is then
        max_position_embeddings / original_max_position_embeddings.
      vllm_multiplies: vLLM multiplies max_position_embeddings by the factor.
      may_leave_max_length: files add the kind and leave max_position_embeddings at the original
        length (the model card of Qwen2.5).
      gguf: GGUF keys below `rope.scaling`, besides the factor, by the field that they give.

    context.rope.type:
      extends: the kinds of base that this kind can extend; () if it extends none.
      grow(spec, factor): a base of this kind at another factor.
    """

    frequencies: Callable[[RopeSpec, int, Length], Frequencies]
    by_length: bool = False
    scales: bool = True
    whole_head: bool = False
    other_names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    check: Callable[[RopeSpec], None] = lambda spec: None
    names_original: bool = False
    factor_from_lengths: bool = False
    vllm_multiplies: bool = False
    may_leave_max_length: bool = False
    gguf: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extends: tuple[str, ...] | Literal["any"] = ()
    grow: Callable[[RopeSpec, float], RopeSpec] = _with_factor

    def can_extend(self, base: str) -> bool:
        """Whether it can extend a base of this kind."""
        if self.extends == "any":
            return not KINDS[base].whole_head
        return base in self.extends

    @property
    def own_base_only(self) -> bool:
        """Whether it extends a base of the same kind alone."""
        return self.extends != "any" and len(self.extends) == 1

    @property
    def reads_max_length(self) -> bool:
        """Whether its angles depend on max_position_embeddings, which a stretched model raises."""
        return self.by_length and not self.names_original


KINDS = {
    "default": Kind(default_frequencies, scales=False),
    "linear": Kind(
        linear_frequencies,
        required=("factor",),
        written=("factor",),
        vllm_multiplies=True,
        extends="any",
    ),
    "dynamic": Kind(
        dynamic_frequencies,
        by_length=True,
        required=("factor",),
        written=("factor",),
        vllm_multiplies=True,
        extends=("default", "dynamic"),  # it leaves short rows unscaled
    ),
    "yarn": Kind(
        yarn_frequencies,
        required=("factor",),
        written=("factor", "beta_fast", "beta_slow", "truncate"),
        names_original=True,
        may_leave_max_length=True,
        gguf={
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        },
        extends="any",
    ),
    "llama3": Kind(
        llama3_frequencies,
        required=("factor", "low_freq_factor", "high_freq_factor"),
        written=("factor", "low_freq_factor", "high_freq_factor"),
        check=_check_llama3,
        names_original=True,
        extends=("llama3",),
    ),
    "longrope": Kind(
        longrope_frequencies,
        by_length=True,
        other_names=("su",),
        required=("short_factor", "long_factor"),
        written=("factor", "short_factor", "long_factor"),
        lists=("short_factor", "long_factor"),
        names_original=True,
        factor_from_lengths=True,
        gguf={"original_max_position_embeddings": "original_context_length"},
        extends=("longrope",),
        grow=grow_longrope,
    ),
    "proportional": Kind(
        proportional_frequencies,
        whole_head=True,
        vllm_multiplies=True,
        extends=("proportional",),
    ),
}
EXTENDABLE = tuple(name for name, kind in KINDS.items() if kind.extends)  # of context.rope.type
LISTS = tuple(name for kind in KINDS.values() for name in kind.lists)
OTHER_NAMES = {other: name for name, kind in KINDS.items() for other in kind.other_names}
