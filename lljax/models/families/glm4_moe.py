"""GLM-4.5: experts by sigmoid scores, RoPE on half of the head (arXiv 2508.06471); transformers
`models/glm4_moe/modeling_glm4_moe.py`.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat, Metadata
from lljax.models.families.sigmoid_experts import (
    CHECKS,
    DEFAULTS,
    dense_first,
    gguf_experts,
    sigmoid_experts,
)
from lljax.models.spec import QKNorm
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "qk_norm": QKNorm() if c["use_qk_norm"] else None,
        "moe": sigmoid_experts(c),
        "layers": dense_first(c),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return gguf_experts(metadata, score=2) | {
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "use_qk_norm": "model.layers.0.self_attn.q_norm.weight" in names,
    }


GGUF = GgufFormat(
    architecture="glm4moe",
    experts=True,
    names={"post_attention_norm": "post_attention_layernorm"},
    partial=True,
    config=_gguf_config,
)
FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
    },
    decoder=_decoder,
    checks=CHECKS | {"use_qk_norm": FLAG},
    peft_experts=True,
    gguf=GGUF,
)
