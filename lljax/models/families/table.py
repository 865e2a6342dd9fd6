"""The table of families by model_type. To add one, see README.md beside this file."""

from lljax.errors import ModelError, short
from lljax.models import rope
from lljax.models.families import (
    cwm,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    granitemoehybrid,
    hunyuan_v1_dense,
    internlm3,
    iquestcoder,
    llama,
    llama4,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    solar_open,
    youtu,
)
from lljax.models.families.family import Family
from lljax.models.spec import DecoderSpec

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        gemma4,
        phi3,
        internlm3,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        glm4_moe,
        deepseek_v3,
        llama4,
        gpt_oss,
        iquestcoder,
        seed_oss,
        smollm3,
        ernie4_5,
        cwm,
        ministral,
        dots1,
        solar_open,
        glm4_moe_lite,
        youtu,
        qwen3_next,
        qwen3_5,
        qwen3_5_moe,
        ministral3,
        granite,
        granitemoehybrid,
        mistral4,
        olmo2,
        olmo3,
        minimax_m2,
        exaone4,
        glm,
        glm4,
        hunyuan_v1_dense,
        ernie4_5_moe,
    )
}


def family_of(hf_config: dict) -> Family:
    """The family of a config.json.

    Raises:
      ModelError: it is none of FAMILIES.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"config.json: model_type {short(family)} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[family]


def is_tied(hf_config: dict) -> bool:
    """Whether config.json, of whatever family, ties the head to the embedding."""
    family = FAMILIES.get(str(hf_config.get("model_type")))
    default = family.defaults.get("tie_word_embeddings", False) if family else False
    return bool(hf_config.get("tie_word_embeddings", default))


def rope_to_hf(spec: DecoderSpec) -> dict:
    """The config.json entries of a decoder's RoPE, see lljax.models.rope.to_hf."""
    family = FAMILIES[spec.family]
    entries = rope.to_hf(spec.rope, spec.max_length)
    if "partial_rotary_factor" in family.defaults:  # transformers assumes it if it is absent
        share = {"partial_rotary_factor": spec.rope.partial}
        entries |= share
        for name in entries.keys() & {"rope_parameters", "rope_scaling"}:
            entries[name] = entries[name] | share
    return family.rope_to_hf(spec, entries)


def rope_fields(family: Family) -> set[str]:
    """The names of the entries that `rope_to_hf` may write."""
    return {*rope.TOP_CHECKS, *family.rope_fields}
