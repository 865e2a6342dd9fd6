"""Qwen3.5 with experts and a gated shared expert, its text model; transformers
`models/qwen3_5_moe/modeling_qwen3_5_moe.py`.

PEFT does not load adapters of its experts.
"""

from typing import Any

from lljax.models.families import qwen_hybrid
from lljax.models.families.family import INSIDE, Family, MultimodalModel, first_set
from lljax.models.families.qwen_layers import softmax_experts, sparse_layers


def _decoder(c: dict) -> dict[str, Any]:
    fields = qwen_hybrid.decoder_fields(c, fused=False)
    experts = softmax_experts(
        c | {"norm_topk_prob": True}, shared=first_set(c, "shared_expert_intermediate_size")
    )
    layers = sparse_layers({"decoder_sparse_step": 1}, fields["layers"])
    return fields | {"F": experts.F, "moe": experts, "layers": layers}


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    defaults=qwen_hybrid.DEFAULTS
    | {
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "intermediate_size": 512,  # of no layer
    },
    decoder=_decoder,
    checks=qwen_hybrid.CHECKS,
    multimodal_parents=(
        MultimodalModel(model_type="qwen3_5_moe", names=(INSIDE,), fused_experts=True),
    ),
)
