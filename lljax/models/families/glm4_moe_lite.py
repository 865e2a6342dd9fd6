"""GLM-4.7-Flash: DeepSeek-V3's attention and experts; transformers
`models/glm4_moe_lite/modeling_glm4_moe_lite.py`.
"""

from typing import Any

from lljax.models.families import latent_attention
from lljax.models.families.family import Family, layers_of_kind
from lljax.models.families.sigmoid_experts import CHECKS, DEFAULTS, sigmoid_experts
from lljax.models.spec import LayerSpec


def _decoder(c: dict) -> dict[str, Any]:
    sparse = layers_of_kind(c, "mlp_layer_types", "sparse", "dense", lambda i: i > 0)
    layers = tuple(LayerSpec(moe=moe) for moe in sparse)
    return {"moe": sigmoid_experts(c), **latent_attention.latent_attention(c, layers)}


FAMILY = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults=DEFAULTS
    | latent_attention.DEFAULTS
    | {
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
    },
    decoder=_decoder,
    checks=CHECKS | latent_attention.CHECKS,
    peft_experts=True,
)
