"""GPT-OSS: attention sinks, every second layer slides, experts with a clamped activation (arXiv
2508.10925); transformers `models/gpt_oss/modeling_gpt_oss.py`.
"""

from typing import Any

from lljax.models.families.family import Family, first_set, local_layers, sliding_window
from lljax.models.spec import LayerSpec, MoESpec
from lljax.models.values import NUMBER


def _decoder(c: dict) -> dict[str, Any]:
    slides = local_layers(c, lambda i: (i + 1) % 2)
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "sinks": True,
        "moe": MoESpec(
            E=first_set(c, "num_local_experts", "num_experts"),
            k=first_set(c, "num_experts_per_tok"),
            F=c["intermediate_size"],
            best_first=True,
            fused="turns",
            bias=True,
            clamp=(c["swiglu_alpha"], c["swiglu_limit"]),
            router="router",
        ),
        "layers": tuple(
            LayerSpec(window=sliding_window(c) if local else None, moe=True) for local in slides
        ),
    }


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    decoder=_decoder,
    checks={"swiglu_alpha": NUMBER, "swiglu_limit": NUMBER},
)
