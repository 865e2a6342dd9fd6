"""Granite 3: factors of embeddings, residual, scores and logits; transformers
`models/granite/modeling_granite.py`.
"""

from typing import Any

from lljax.models.families.family import Family
from lljax.models.values import FLAG, NUMBER

SCALE_DEFAULTS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
SCALE_CHECKS = dict.fromkeys(SCALE_DEFAULTS, NUMBER)


def scales(c: dict) -> dict[str, Any]:
    """The factors, as fields of DecoderSpec."""
    return {
        "embed_scale": float(c["embedding_multiplier"]),
        "residual_scale": float(c["residual_multiplier"]),
        "attention_scale": float(c["attention_multiplier"]),
        "logit_scale": 1 / c["logits_scaling"],
    }


def _decoder(c: dict) -> dict[str, Any]:
    return scales(c) | {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
    }


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults=SCALE_DEFAULTS
    | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    decoder=_decoder,
    checks=SCALE_CHECKS | {"mlp_bias": FLAG},
)
