"""Llama 1 to 3 (Dubey et al. 2024, arXiv 2407.21783); transformers
`models/llama/modeling_llama.py`.
"""

import dataclasses
from typing import Any

from lljax.models.families.family import Family, GgufFormat, Metadata
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
    }


GGUF = GgufFormat(
    architecture="llama",
    permuted=True,
    config=_gguf_config,
    rope_kinds=("default", "linear", "yarn", "llama3", "longrope"),
)
GGUF_WRITTEN = dataclasses.replace(GGUF, read=False)  # of families whose files are Llama's
FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    decoder=_decoder,
    checks={"mlp_bias": FLAG},
    gguf=GGUF,
)
