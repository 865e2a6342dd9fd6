"""DeepSeek-V3 and R1, Kimi K2: multi-head latent attention, experts by sigmoid scores (DeepSeek-AI
2024, arXiv 2412.19437); transformers `models/deepseek_v3/modeling_deepseek_v3.py`.
"""

from typing import Any

from lljax.models.families import latent_attention
from lljax.models.families.family import INSIDE, WRAPPED, Family, MultimodalModel
from lljax.models.families.sigmoid_experts import CHECKS, DEFAULTS, dense_first, sigmoid_experts


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "moe": sigmoid_experts(c),
        **latent_attention.latent_attention(c, dense_first(c)),
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults=DEFAULTS | latent_attention.DEFAULTS | {"max_position_embeddings": 4096},
    decoder=_decoder,
    checks=CHECKS | latent_attention.CHECKS,
    peft_experts=True,
    multimodal_parents=(
        MultimodalModel(model_type="kimi_k25", names=(INSIDE, WRAPPED), tied=True),
    ),
    aliases={"kimi_k2": {}},
)
