"""GLM-4 of 2024: RoPE on half of the head, gate and up in one tensor (arXiv 2406.12793);
transformers `models/glm/modeling_glm.py`.
"""

from typing import Any

from lljax.models.families.family import Family
from lljax.models.spec import MLPNames

DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "interleaved": True,
        "mlp": MLPNames(gate_up="gate_up_proj"),
    }


FAMILY = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    defaults=DEFAULTS,
    decoder=decoder,
)
