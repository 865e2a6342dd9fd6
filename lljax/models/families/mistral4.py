"""Mistral Small 4: DeepSeek-V3's attention and experts, the experts by softmax scores, and queries
that grow with the position; transformers `models/mistral4/modeling_mistral4.py`.
"""

import dataclasses
from typing import Any

from lljax.errors import ModelError
from lljax.models.families import deepseek_v3, position_temperature
from lljax.models.families.family import Family, first_set
from lljax.models.families.mistral import MISTRAL3
from lljax.models.spec import DecoderSpec
from lljax.models.values import SHARE, check, optional

SHARE_NAME = "partial_rotary_factor"


def _decoder(c: dict) -> dict[str, Any]:
    fields = deepseek_v3.FAMILY.decoder(c)
    moe = dataclasses.replace(fields["moe"], score="softmax", correction=False, fused="rows")
    return fields | {"moe": moe, "temperature": position_temperature.temperature(c)}


def _ropes(c: dict) -> tuple[dict, ...]:
    """config.json without the share of a query that RoPE rotates: latent attention names the
    dimensions (`MLASpec.rope`).

    Raises:
      ModelError: the two differ.
    """
    size = first_set(c, "qk_rope_head_dim")
    share = size / (size + first_set(c, "qk_nope_head_dim"))
    for name in ("rope_scaling", "rope_parameters"):
        if not (given := c.get(name)):
            continue
        check(given, {SHARE_NAME: optional(SHARE)}, f"config.json: {name}")
        if given.get(SHARE_NAME, share) not in (None, share):
            raise ModelError(
                f"config.json: {SHARE_NAME}={given[SHARE_NAME]} and qk_rope_head_dim={size} "
                f"differ; it has to be {share}"
            )
        c = c | {name: {key: value for key, value in given.items() if key != SHARE_NAME}}
    return ({key: value for key, value in c.items() if key != SHARE_NAME},)


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    entries = position_temperature.rope_to_hf(spec, entries)
    share = {SHARE_NAME: spec.rotary() / spec.H}
    return entries | {
        name: entries[name] | share for name in entries.keys() & {"rope_parameters", "rope_scaling"}
    }


FAMILY = Family(
    model_type="mistral4",
    architecture="Mistral4ForCausalLM",
    defaults={
        **deepseek_v3.FAMILY.defaults,
        "max_position_embeddings": 1_048_576,
        "rms_norm_eps": 1e-6,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            position_temperature.BETA: 0.1,
        },
    },
    decoder=_decoder,
    checks=deepseek_v3.FAMILY.checks,
    ropes=_ropes,
    rope_to_hf=_rope_to_hf,
    rope_kinds=("yarn",),  # see ministral3.py
    loader="Mistral4ForCausalLM",  # transformers has no automatic choice of it
    multimodal_parents=(MISTRAL3,),
)
