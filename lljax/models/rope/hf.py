"""The RoPE of a HuggingFace config.json, read and written."""

import dataclasses
from typing import Any

from lljax.errors import ModelError, short
from lljax.models.rope.kinds import KINDS, LISTS, OTHER_NAMES, RopeSpec
from lljax.models.values import (
    FLAG,
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

# Fields of `rope_parameters` that are fields of RopeSpec, and the values that they may hold.
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
THETA = Value(lambda x: NUMBER.holds(x) and x > 1, "a number above 1")
CHECKS = SCALING | {  # every field of `rope_parameters`
    "type": WORD,
    "rope_type": WORD,
    "rope_theta": THETA,
    "partial_rotary_factor": optional(SHARE),
    "original_max_position_embeddings": optional(whole(1)),
}
TOP_CHECKS = {  # fields beside `rope_parameters`, at the top of config.json
    "rope_theta": THETA,
    "partial_rotary_factor": optional(SHARE),
    "original_max_position_embeddings": optional(whole(1)),
    "max_position_embeddings": whole(1),
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(RopeSpec)}


def from_hf(hf_config: dict) -> RopeSpec:
    """Reads `rope_parameters` (transformers 5) or the legacy `rope_theta` and `rope_scaling`.

    If both are present the legacy form wins, as it does in transformers.

    Raises:
      ModelError: an unknown kind, a missing field, a value that cannot be right, or a RoPE by layer
        type.
    """
    check(hf_config, TOP_CHECKS)
    given = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    name = _kind_name(given)
    kind = KINDS[name]
    max_length = hf_config.get("max_position_embeddings", DEFAULTS["original_length"])
    original = max_length
    if kind.names_original:  # the top of config.json has precedence
        original = (
            hf_config.get("original_max_position_embeddings")
            or given.get("original_max_position_embeddings")
            or max_length
        )

    def first(field: str, default: Any) -> Any:
        values = (given.get(field), hf_config.get(field), default)
        return next(value for value in values if value is not None)

    fields = {
        "type": name,
        "theta": first("rope_theta", DEFAULTS["theta"]),
        "original_length": original,
        "partial": first("partial_rotary_factor", DEFAULTS["partial"]),
    }
    for field in SCALING if kind.scales else ():
        if given.get(field) is not None:
            fields[field] = tuple(given[field]) if field in LISTS else given[field]
    if kind.factor_from_lengths:
        fields.setdefault("factor", max_length / original)
    spec = RopeSpec(**fields)
    kind.check(spec)
    return spec


def _kind_name(given: dict) -> str:
    """The name of the kind of `rope_parameters`, whose fields are checked."""
    if any(isinstance(value, dict) and name not in CHECKS for name, value in given.items()):
        raise ModelError(
            "config.json: rope_parameters has to be one flat object, the same for every layer"
        )
    kind = given.get("rope_type", given.get("type", DEFAULTS["type"]))
    check(given, CHECKS, f"config.json: rope_type {short(kind)}")
    kind = OTHER_NAMES.get(kind, kind)
    if kind not in KINDS:
        raise ModelError(f"config.json: rope_type {short(kind)} is none of {', '.join(KINDS)}")
    for field in KINDS[kind].required:
        if given.get(field) is None:
            raise ModelError(f"config.json: rope_type {kind!r} needs {field!r}")
    return kind


def to_hf(spec: RopeSpec, max_length: int) -> dict[str, Any]:
    """The config.json entries of a RoPE, in the new and the legacy form, for a model that reads
    `max_length` tokens.

    `max_position_embeddings` is the extended length, except for a kind that vLLM multiplies
    (`Kind.vllm_multiplies`): there it stays the original length. Factors are JSON floats: vLLM
    tests for the type. The legacy entry comes first: if these entries override a loaded config
    of transformers 5, one after the other, each of the two replaces the other whole, and the new
    one holds everything. transformers 4 reads the rotary share of the head, and the original length
    of longrope, beside the legacy entry alone, and computes the factor of longrope from both
    lengths.
    """
    kind = KINDS[spec.type]
    parameters: dict[str, Any] = {"rope_type": spec.type, "rope_theta": float(spec.theta)}
    beside: dict[str, Any] = {"rope_theta": float(spec.theta)}
    for name, value in scaling(spec).items():
        parameters[name] = list(value) if name in LISTS else value
        if name in ("factor", "attention_factor"):
            parameters[name] = float(value)
    if kind.names_original:
        parameters["original_max_position_embeddings"] = spec.original_length
    if kind.vllm_multiplies:
        max_length = spec.original_length
    if kind.factor_from_lengths:
        beside["original_max_position_embeddings"] = spec.original_length
        max_length = max(max_length, int(spec.original_length * spec.factor))
    if spec.partial != 1:
        parameters["partial_rotary_factor"] = beside["partial_rotary_factor"] = spec.partial
    if kind.scales:
        beside["rope_scaling"] = dict(parameters)
    return {**beside, "rope_parameters": parameters, "max_position_embeddings": max_length}


def scaling(spec: RopeSpec) -> dict[str, Any]:
    """The fields of a scaling: the fields that its kind always writes, and others that are set."""
    kind = KINDS[spec.type]
    if not kind.scales:
        return {}
    return {
        name: getattr(spec, name)
        for name in SCALING
        if name in kind.written or getattr(spec, name) != DEFAULTS[name]
    }


def reach(spec: RopeSpec, max_position_embeddings: int) -> int:
    """The tokens that a model with this config.json reads (vLLM's rule, see `to_hf`)."""
    kind = KINDS[spec.type]
    if kind.vllm_multiplies or kind.may_leave_max_length:
        return max(max_position_embeddings, int(spec.original_length * spec.factor))
    return max_position_embeddings
