"""Qwen3.5, its text model: three gated delta networks to one gated attention; transformers
`models/qwen3_5/modeling_qwen3_5.py`.
"""

from typing import Any

from lljax.models.families import qwen_hybrid
from lljax.models.families.family import INSIDE, Family, MultimodalModel


def _decoder(c: dict) -> dict[str, Any]:
    return qwen_hybrid.decoder_fields(c, fused=False)


FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    defaults=qwen_hybrid.DEFAULTS | {"num_key_value_heads": 4},
    decoder=_decoder,
    checks=qwen_hybrid.CHECKS,
    multimodal_parents=(MultimodalModel(model_type="qwen3_5", names=(INSIDE,)),),
)
