"""Seed-OSS: Llama with biases of queries, keys and values, and heads of their own size;
transformers `models/seed_oss/modeling_seed_oss.py`.

Its dropout of the residual is a setting of pretraining, and is not applied.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat, Metadata
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_out_bias"],
        "mlp_bias": c["mlp_bias"],
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in names}


FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    defaults={
        "max_position_embeddings": 524_288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    decoder=_decoder,
    checks={"attention_out_bias": FLAG, "mlp_bias": FLAG},
    gguf=GgufFormat(
        architecture="seed_oss",
        names={"post_attention_norm": "post_attention_layernorm"},
        config=_gguf_config,
    ),
)
