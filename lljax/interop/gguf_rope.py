"""The RoPE scaling in GGUF files, read into config.json's form and written as llama.cpp reads it.

Keys and tensors: llama.cpp's llama-arch.cpp; what its program makes of them: llama-context.cpp and
`rope_yarn` of ggml-cpu/ops.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lljax.errors import ConfigError, ModelError, short
from lljax.models import rope
from lljax.models.rope import KINDS, RopeSpec, frequencies, yarn_magnitude
from lljax.models.rope.kinds import base_frequencies, llama3_frequencies
from lljax.models.values import NOT_NEGATIVE, check, whole

FREQS = "rope_freqs.weight"  # divisors of the frequencies of Llama 3
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of longrope
TENSORS = (FREQS, LONG, SHORT)
LISTS = {"long_factor": LONG, "short_factor": SHORT}
# Other scalings of llama.cpp, with the values that change nothing.
NEUTRAL = {
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
    "alpha": 0.0,
}
STILL = 1e30  # the divisor of a pair that does not turn
LLAMA3_LENGTH = 8192  # the original length of all released Llama 3
USE_FOLDER = "use the HuggingFace folder of this model"


# ---------------------------------------------------------------- reading
def read_rope(
    field: Callable[[str], Any],
    tensors: Mapping[str, np.ndarray],
    *,
    theta: float,
    H: int,
    where: str,
    kinds: tuple[str, ...] = (),
    log_multiplier: float = 0.0,
) -> dict[str, Any] | None:
    """The entry `rope_scaling` of config.json; None if the RoPE is not scaled.

    field(key): the metadata below `rope.scaling`, None if it is absent. tensors: those of TENSORS
    that the file has. where: the file and the prefix of the keys, for errors. kinds:
    `GgufFormat.rope_kinds`. log_multiplier: `GgufFormat.yarn_log_multiplier`.

    Raises:
      ModelError: an unknown kind, a scaling that is not supported, or a value that cannot be right.
    """
    if FREQS in tensors and "proportional" in kinds:
        return _read_proportional(tensors[FREQS], where)
    if FREQS in tensors:
        length = field("original_context_length") or LLAMA3_LENGTH
        check({"original_context_length": length}, {"original_context_length": whole(1)}, where)
        return _read_llama3(tensors[FREQS], theta, H, length, where)
    kind = field("type")
    if kind is None and LONG in tensors:
        kind = "longrope"  # files of Phi-3 do not name it
    if kind in (None, "none"):
        return None
    for key, neutral in NEUTRAL.items():
        if key == "yarn_log_multiplier" and log_multiplier:
            continue
        if (value := field(key)) not in (None, neutral):
            raise ModelError(
                f"{where}.{key} is {short(value)}, which is not supported: {USE_FOLDER}"
            )
    scaling = {"rope_type": kind, "factor": field("factor")}
    known = KINDS[kind] if isinstance(kind, str) and kind in KINDS else None
    scaling |= {name: field(key) for name, key in (known.gguf if known else {}).items()}
    for name in known.lists if known else ():
        if LISTS[name] in tensors:
            scaling[name] = [float(x) for x in tensors[LISTS[name]]]
    check(scaling, rope.CHECKS, where)
    scale, weight = field("attn_factor"), field("yarn_log_multiplier") or 0.0
    check(
        {"attn_factor": scale, "yarn_log_multiplier": weight},
        {"attn_factor": rope.CHECKS["factor"], "yarn_log_multiplier": NOT_NEGATIVE},
        where,
    )
    if weight:  # llama.cpp takes mscale to be 1
        weight = round(weight / log_multiplier, 6)
        scaling |= {"mscale": 1.0, "mscale_all_dim": weight}
    if scale is not None or kind == "longrope":
        own = _own_magnitude(kind, scaling["factor"], weight)
        scaling["attention_factor"] = (1.0 if scale is None else scale) * own
    return scaling


def _own_magnitude(kind: str, factor: float | None, weight: float | None = None) -> float:
    """The factor of queries and keys that llama.cpp multiplies with attn_factor; weight: the
    mscale_all_dim that it reads.
    """
    if kind != "yarn":
        return 1.0
    spec = RopeSpec(factor=factor or 1.0)
    return yarn_magnitude(spec, 1.0) / (yarn_magnitude(spec, weight) if weight else 1.0)


def _read_llama3(
    divisors: np.ndarray, theta: float, H: int, length: int, where: str
) -> dict[str, Any]:
    """The parameters that give these divisors of the frequencies [H / 2].

    The file does not keep them. All released Llama 3 share them except the factor, which is the
    largest divisor; this is checked.
    """
    spec = RopeSpec(
        type="llama3", theta=theta, factor=float(divisors.max()), original_length=length
    )
    wanted = llama3_divisors(spec, H)
    if wanted.shape != divisors.shape or not np.allclose(wanted, divisors, rtol=1e-4):
        raise ModelError(
            f"{where}: its RoPE factors ({FREQS}) are not of the kind llama3: {USE_FOLDER}"
        )
    return {
        "rope_type": "llama3",
        "factor": spec.factor,
        "low_freq_factor": spec.low_freq_factor,
        "high_freq_factor": spec.high_freq_factor,
        "original_max_position_embeddings": spec.original_length,
    }


def _read_proportional(divisors: np.ndarray, where: str) -> dict[str, Any]:
    """The share of the pairs that turn, and the factor, which is the divisor of all of these."""
    turning = int((divisors < STILL / 2).sum())
    if not turning or not np.all(divisors[:turning] == divisors[0]):
        raise ModelError(
            f"{where}: its RoPE factors ({FREQS}) are not of the kind proportional: {USE_FOLDER}"
        )
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": turning / len(divisors),
        "factor": float(divisors[0]),
    }


def llama3_divisors(spec: RopeSpec, H: int) -> np.ndarray:
    """What llama3 divides the frequencies by, float32 [H / 2]."""
    return base_frequencies(spec.theta, H) / np.asarray(llama3_frequencies(spec, H, 0).inverse)


# ---------------------------------------------------------------- writing
class RopeEntries(NamedTuple):
    """metadata: values by key below `rope.scaling`. tensors: those of TENSORS."""

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]


def _default(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    return RopeEntries({}, {})


def _linear(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    return RopeEntries({"type": "linear", "factor": float(spec.factor)}, {})


def _yarn(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    metadata = {
        "type": "yarn",
        "factor": float(spec.factor),
        "original_context_length": spec.original_length,
        "yarn_beta_fast": float(spec.beta_fast),
        "yarn_beta_slow": float(spec.beta_slow),
    }
    weight = spec.mscale_all_dim if log_multiplier else None
    if weight:
        metadata["yarn_log_multiplier"] = log_multiplier * weight
    return RopeEntries(metadata | _attn_factor(spec, H, weight), {})


def _llama3(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    # The key is for our reader: llama.cpp reads the divisors alone.
    return RopeEntries(
        {"original_context_length": spec.original_length},
        {FREQS: llama3_divisors(spec, H).astype(np.float32)},
    )


def _longrope(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    # Without the factor, by which llama.cpp would divide all frequencies besides.
    metadata = {"type": "longrope", "original_context_length": spec.original_length}
    tensors = {
        LISTS[name]: np.asarray(getattr(spec, name), np.float32) for name in KINDS["longrope"].lists
    }
    return RopeEntries(metadata | _attn_factor(spec, H), tensors)


def _proportional(spec: RopeSpec, H: int, log_multiplier: float) -> RopeEntries:
    turns = np.asarray(frequencies(spec, H, 0).inverse) > 0
    return RopeEntries({}, {FREQS: np.where(turns, spec.factor, STILL).astype(np.float32)})


def _attn_factor(spec: RopeSpec, H: int, weight: float | None = None) -> dict[str, float]:
    scale = frequencies(spec, H, 1).scale / _own_magnitude(spec.type, spec.factor, weight)
    return {} if np.isclose(scale, 1, rtol=1e-6, atol=0) else {"attn_factor": float(scale)}


# llama.cpp has no dynamic scaling. It chooses between the factors of longrope by the length of its
# context (-c), and not of the text.
WRITERS: dict[str, Callable[[RopeSpec, int, float], RopeEntries]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}


def write_rope(
    spec: RopeSpec, H: int, kinds: tuple[str, ...], log_multiplier: float = 0.0
) -> RopeEntries:
    """The RoPE scaling of a model with heads of size H. kinds, log_multiplier: see `read_rope`.

    Raises:
      ConfigError: llama.cpp has no such scaling.
    """
    if spec.type not in WRITERS or spec.type not in kinds:
        raise ConfigError(
            f"--format=gguf: llama.cpp has no RoPE of the kind {spec.type!r} for this model, only "
            f"{', '.join(kinds)}: use --format=merged"
        )
    return WRITERS[spec.type](spec, H, log_multiplier)


def command_options(spec: RopeSpec, H: int) -> list[str] | None:
    """The options of llama.cpp's programs that give a base this RoPE, for an adapter, which cannot
    carry it; None if there are none.
    """
    if spec.type == "linear":
        return ["--rope-scaling", "linear", "--rope-scale", f"{spec.factor:g}"]
    if spec.type != "yarn" or _attn_factor(spec, H):
        return [] if spec.type == "default" else None
    return [
        *("--rope-scaling", "yarn", "--rope-scale", f"{spec.factor:g}"),
        *("--yarn-orig-ctx", str(spec.original_length)),
        *("--yarn-beta-fast", f"{spec.beta_fast:g}", "--yarn-beta-slow", f"{spec.beta_slow:g}"),
    ]
