"""Experts by sigmoid scores, as DeepSeek-V3 and GLM-4.5 have them (DeepSeek-AI 2024, arXiv
2412.19437, section 2.1.2).
"""

from typing import Any

from lljax.models.families.family import Metadata, first_set
from lljax.models.spec import LayerSpec, MoESpec
from lljax.models.values import FLAG, NUMBER, Value, whole

DEFAULTS = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
SIGMOID = Value(lambda x: x == 2, "2, a sigmoid")  # of GGUF files
CHECKS = {
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": NUMBER,
    "first_k_dense_replace": whole(0),
}


def sigmoid_experts(c: dict) -> MoESpec:
    F = first_set(c, "moe_intermediate_size")
    return MoESpec(
        E=first_set(c, "n_routed_experts", "num_local_experts"),
        k=first_set(c, "num_experts_per_tok"),
        F=F,
        score="sigmoid",
        correction=True,
        normalize=c["norm_topk_prob"],
        scale=c["routed_scaling_factor"],
        groups=first_set(c, "n_group"),
        best_groups=first_set(c, "topk_group"),
        shared=F * first_set(c, "n_shared_experts"),
    )


def gguf_experts(metadata: Metadata, *, score: int | None = None) -> dict[str, Any]:
    """The fields of the experts in GGUF files; score: what llama.cpp takes for expert_gating_func
    if a file has none.
    """
    metadata("expert_gating_func", score, SIGMOID)
    return {
        "moe_intermediate_size": metadata("expert_feed_forward_length"),
        "n_routed_experts": metadata("expert_count"),
        "num_experts_per_tok": metadata("expert_used_count"),
        "n_shared_experts": metadata("expert_shared_count"),
        "first_k_dense_replace": metadata("leading_dense_block_count", 0, whole(0)),
        "routed_scaling_factor": metadata("expert_weights_scale", 1.0, NUMBER),
        "norm_topk_prob": metadata("expert_weights_norm", False, FLAG),
        "n_group": metadata("expert_group_count", 1),
        "topk_group": metadata("expert_group_used_count", 1),
    }


def dense_first(c: dict) -> tuple[LayerSpec, ...]:
    """Experts in every layer except the first `first_k_dense_replace`."""
    dense = c["first_k_dense_replace"]
    return tuple(LayerSpec(moe=i >= dense) for i in range(c["num_hidden_layers"]))
