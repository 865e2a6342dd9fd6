"""Qwen1.5-MoE and Qwen2-MoE: experts and a gated shared expert; transformers
`models/qwen2_moe/modeling_qwen2_moe.py`.

PEFT does not load adapters of its experts.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat, Metadata, first_set
from lljax.models.families.qwen_layers import (
    EXPERT_CHECKS,
    EXPERT_DEFAULTS,
    WINDOW_CHECKS,
    WINDOW_DEFAULTS,
    sliding_layers,
    softmax_experts,
    sparse_layers,
)
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    def even(i: int) -> bool:
        """Of the first `max_window_layers`; Qwen2's windows are in the layers after these."""
        return i % 2 == 0 and i < c["max_window_layers"]

    return {
        "qkv_bias": c["qkv_bias"],
        "moe": softmax_experts(c, shared=first_set(c, "shared_expert_intermediate_size")),
        "layers": sparse_layers(c, sliding_layers(c, even)),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """In llama.cpp the head is a tensor of its own, and heads have the size D / N."""
    return {
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "num_experts": metadata("expert_count"),
        "num_experts_per_tok": metadata("expert_used_count"),
        "moe_intermediate_size": metadata("expert_feed_forward_length"),
        "shared_expert_intermediate_size": metadata(
            "expert_shared_feed_forward_length", config["intermediate_size"]
        ),
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults=WINDOW_DEFAULTS
    | EXPERT_DEFAULTS
    | {"max_position_embeddings": 32_768, "num_key_value_heads": 16, "qkv_bias": True},
    decoder=_decoder,
    checks=WINDOW_CHECKS | EXPERT_CHECKS | {"qkv_bias": FLAG},
    gguf=GgufFormat(
        architecture="qwen2moe",
        experts=True,
        names={
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
        one_row=("shared_expert_gate.weight",),
        config=_gguf_config,
    ),
)
