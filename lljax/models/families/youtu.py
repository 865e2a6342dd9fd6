"""Youtu-LLM: a dense model with multi-head latent attention (arXiv 2512.24618); transformers
`models/youtu/modeling_youtu.py`.
"""

from typing import Any

from lljax.models.families import latent_attention
from lljax.models.families.family import Family, uniform_layers
from lljax.models.spec import LayerSpec


def _decoder(c: dict) -> dict[str, Any]:
    return latent_attention.latent_attention(c, uniform_layers(c, LayerSpec()))


FAMILY = Family(
    model_type="youtu",
    architecture="YoutuForCausalLM",
    defaults=latent_attention.DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    decoder=_decoder,
    checks=latent_attention.CHECKS,
)
