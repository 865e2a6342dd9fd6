"""Queries that grow with the position, as Ministral 3 and Mistral Small 4 have them; transformers
`models/ministral3/modeling_ministral3.py`, `get_llama_4_attn_scale`.
"""

from lljax.models.rope import CHECKS, Temperature
from lljax.models.spec import DecoderSpec
from lljax.models.values import NOT_NEGATIVE, check, optional

BETA = "llama_4_scaling_beta"  # a field of rope_parameters
ORIGINAL = "original_max_position_embeddings"


def temperature(c: dict) -> Temperature | None:
    """The temperature that `rope_parameters` names; None if it names none."""
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    check(given, {BETA: optional(NOT_NEGATIVE), ORIGINAL: CHECKS[ORIGINAL]}, "config.json: RoPE")
    if not given.get(BETA):
        return None
    floor = c.get(ORIGINAL) or given.get(ORIGINAL) or c["max_position_embeddings"]
    return Temperature(given[BETA], floor)


def rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    """The entries of a RoPE, with the temperature in them."""
    if spec.temperature is None:
        return entries
    named = {BETA: spec.temperature.weight}
    return entries | {
        name: entries[name] | named for name in entries.keys() & {"rope_parameters", "rope_scaling"}
    }
