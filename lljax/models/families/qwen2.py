"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671); transformers
`models/qwen2/modeling_qwen2.py`.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat
from lljax.models.families.qwen_layers import WINDOW_CHECKS, WINDOW_DEFAULTS, upper_layers_slide


def _decoder(c: dict) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": upper_layers_slide(c)}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=WINDOW_DEFAULTS | {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    decoder=_decoder,
    checks=WINDOW_CHECKS,
    gguf=GgufFormat(architecture="qwen2"),
)
