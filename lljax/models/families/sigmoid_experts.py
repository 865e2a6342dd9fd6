"""Experts by sigmoid scores, as DeepSeek-V3 and GLM-4.5 have them (DeepSeek-AI 2024, arXiv
2412.19437, section 2.1.2).
"""

from lljax.models.families.family import first_set
from lljax.models.spec import LayerSpec, MoESpec
from lljax.models.values import FLAG, NUMBER, whole

DEFAULTS = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
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


def dense_first(c: dict) -> tuple[LayerSpec, ...]:
    """Experts in every layer except the first `first_k_dense_replace`."""
    dense = c["first_k_dense_replace"]
    return tuple(LayerSpec(moe=i >= dense) for i in range(c["num_hidden_layers"]))
