"""Qwen3-Next: three gated delta networks to one gated attention, experts and a gated shared expert;
transformers `models/qwen3_next/modeling_qwen3_next.py`.
"""

from typing import Any

from lljax.models.families import qwen_hybrid
from lljax.models.families.family import Family, first_set
from lljax.models.families.qwen_layers import (
    EXPERT_CHECKS,
    EXPERT_DEFAULTS,
    softmax_experts,
    sparse_layers,
)


def _decoder(c: dict) -> dict[str, Any]:
    fields = qwen_hybrid.decoder_fields(c, fused=True)
    return fields | {
        "moe": softmax_experts(c, shared=first_set(c, "shared_expert_intermediate_size")),
        "layers": sparse_layers(c, fields["layers"]),
    }


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    defaults=qwen_hybrid.DEFAULTS
    | EXPERT_DEFAULTS
    | {
        "num_key_value_heads": 2,
        "norm_topk_prob": True,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "intermediate_size": 5632,
    },
    decoder=_decoder,
    checks=EXPERT_CHECKS | qwen_hybrid.CHECKS,
    peft_experts=True,
)
