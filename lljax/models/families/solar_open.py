"""Solar Open: experts by sigmoid scores in every layer; transformers
`models/solar_open/modeling_solar_open.py`.

Its GGUF files call themselves glm4moe, and are read as GLM-4.5.
"""

import dataclasses
from typing import Any

from lljax.models.families import glm4_moe
from lljax.models.families.family import Family, uniform_layers
from lljax.models.families.sigmoid_experts import CHECKS, DEFAULTS, sigmoid_experts
from lljax.models.spec import LayerSpec


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "moe": sigmoid_experts(c),
        "layers": uniform_layers(c, LayerSpec(moe=True)),
    }


FAMILY = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "intermediate_size": 10_240,  # of dense layers, which there are none of
        "moe_intermediate_size": 1280,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    decoder=_decoder,
    checks=CHECKS,
    peft_experts=True,
    gguf=dataclasses.replace(glm4_moe.GGUF, read=False),
)
