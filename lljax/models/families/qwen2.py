"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671); transformers
`models/qwen2/modeling_qwen2.py`.
"""

from typing import Any

from lljax.models.families.family import BESIDE, INSIDE, Family, GgufFormat, MultimodalModel
from lljax.models.families.qwen_layers import WINDOW_CHECKS, WINDOW_DEFAULTS, upper_layers_slide

VISION_DEFAULTS = {  # of Qwen2.5-VL
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_window_layers": 80,
}


def _decoder(c: dict) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": upper_layers_slide(c)}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=WINDOW_DEFAULTS | {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    decoder=_decoder,
    checks=WINDOW_CHECKS,
    gguf=GgufFormat(architecture="qwen2"),
    multimodal_parents=(
        MultimodalModel(
            model_type="qwen2_5_vl", names=(INSIDE, BESIDE), flat=True, defaults=VISION_DEFAULTS
        ),
    ),
    aliases={"qwen2_5_vl_text": VISION_DEFAULTS},
)
