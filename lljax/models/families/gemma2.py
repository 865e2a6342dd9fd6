"""Gemma 2: every second layer slides, soft-capped scores and logits (arXiv 2408.00118);
transformers `models/gemma2/modeling_gemma2.py`.
"""

from typing import Any

from lljax.models.families import gemma_layers
from lljax.models.families.family import Family, sliding_window
from lljax.models.spec import LayerSpec


def _decoder(c: dict) -> dict[str, Any]:
    slides, window = gemma_layers.sliding_layers(c, 2), sliding_window(c)
    return gemma_layers.decoder_fields(c) | {
        "layers": tuple(LayerSpec(window=window if local else None) for local in slides),
        "attention_softcap": c["attn_logit_softcapping"],
    }


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults=gemma_layers.DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    decoder=_decoder,
    checks=gemma_layers.CHECKS,
)
