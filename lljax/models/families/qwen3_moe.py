"""Qwen3-MoE: norms of queries and keys, experts (Qwen Team 2025, arXiv 2505.09388); transformers
`models/qwen3_moe/modeling_qwen3_moe.py`.
"""

from typing import Any

from lljax.models.families.family import (
    INSIDE,
    Family,
    GgufFormat,
    Metadata,
    MultimodalModel,
    sliding_window,
    uniform_layers,
)
from lljax.models.families.qwen_layers import (
    EXPERT_CHECKS,
    EXPERT_DEFAULTS,
    softmax_experts,
    sparse_layers,
)
from lljax.models.spec import LayerSpec, QKNorm
from lljax.models.values import FLAG

VISION_DEFAULTS = {  # of Qwen3-VL-MoE
    "max_position_embeddings": 128_000,
    "num_key_value_heads": 16,
    "rope_theta": 500_000.0,
    "norm_topk_prob": True,
}


def _decoder(c: dict) -> dict[str, Any]:
    window = sliding_window(c) if c["use_sliding_window"] else None
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(),
        "moe": softmax_experts(c),
        "layers": sparse_layers(c, uniform_layers(c, LayerSpec(window=window))),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """llama.cpp normalizes the weights, and has experts in every layer."""
    return {
        "num_experts": metadata("expert_count"),
        "num_experts_per_tok": metadata("expert_used_count"),
        "moe_intermediate_size": metadata("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults=EXPERT_DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    decoder=_decoder,
    checks=EXPERT_CHECKS | {"use_sliding_window": FLAG},
    peft_experts=True,
    gguf=GgufFormat(architecture="qwen3moe", experts=True, config=_gguf_config),
    multimodal_parents=(
        MultimodalModel(
            model_type="qwen3_vl_moe",
            names=(INSIDE,),
            defaults=VISION_DEFAULTS,
            fused_experts=True,
        ),
    ),
    aliases={"qwen3_vl_moe_text": VISION_DEFAULTS},
)
