"""Qwen3: norms of queries and keys (Qwen Team 2025, arXiv 2505.09388); transformers
`models/qwen3/modeling_qwen3.py`.
"""

from typing import Any

from lljax.models.families.family import INSIDE, Family, GgufFormat, MultimodalModel
from lljax.models.families.qwen_layers import WINDOW_CHECKS, WINDOW_DEFAULTS, upper_layers_slide
from lljax.models.spec import QKNorm

VISION_DEFAULTS = {"max_position_embeddings": 128_000, "rope_theta": 500_000.0}  # of Qwen3-VL


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(),
        "layers": upper_layers_slide(c),
    }


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=WINDOW_DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    decoder=_decoder,
    checks=WINDOW_CHECKS,
    gguf=GgufFormat(architecture="qwen3"),
    multimodal_parents=(
        MultimodalModel(model_type="qwen3_vl", names=(INSIDE,), defaults=VISION_DEFAULTS),
    ),
    aliases={"qwen3_vl_text": VISION_DEFAULTS},
)
