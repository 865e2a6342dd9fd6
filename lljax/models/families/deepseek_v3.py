"""DeepSeek-V3 and R1: multi-head latent attention, experts by sigmoid scores (DeepSeek-AI 2024,
arXiv 2412.19437); transformers `models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import dataclasses
from typing import Any

from lljax.models.families.family import Family, first_set
from lljax.models.families.sigmoid_experts import CHECKS, DEFAULTS, dense_first, sigmoid_experts
from lljax.models.spec import MLASpec
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "moe": sigmoid_experts(c),
        "mla": MLASpec(
            q_rank=None if c.get("q_lora_rank") is None else first_set(c, "q_lora_rank"),
            kv_rank=first_set(c, "kv_lora_rank"),
            rope=first_set(c, "qk_rope_head_dim"),
            v=first_set(c, "v_head_dim"),
        ),
        "interleaved": c["rope_interleave"],
        "layers": tuple(dataclasses.replace(layer, mixer="mla") for layer in dense_first(c)),
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults=DEFAULTS
    | {"max_position_embeddings": 4096, "attention_bias": False, "rope_interleave": True},
    decoder=_decoder,
    checks=CHECKS | {"rope_interleave": FLAG},
    peft_experts=True,
)
