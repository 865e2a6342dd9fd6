"""Granite 3: factors of embeddings, residual, scores and logits; transformers
`models/granite/modeling_granite.py`.
"""

from typing import Any

from lljax.models.families import llama
from lljax.models.families.family import Family, GgufFormat, Metadata
from lljax.models.spec import DecoderSpec
from lljax.models.values import FLAG, NUMBER, Value

SCALE_DEFAULTS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
GGUF_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
ROPE_ON = Value(lambda x: x is True, "true, since models without RoPE are not supported")
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


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    metadata("rope.scaling.finetuned", True, ROPE_ON)
    default = {"attention.scale": config["head_dim"] ** -0.5}
    return llama.GGUF.config(config, metadata, names) | {
        field: metadata(key, default.get(key, 1.0), NUMBER) for field, key in GGUF_SCALES.items()
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "embedding_scale": spec.embed_scale,
        "residual_scale": spec.residual_scale,
        "attention.scale": spec.scale,
        "logit_scale": 1 / spec.logit_scale,
    }


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults=SCALE_DEFAULTS
    | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    decoder=_decoder,
    checks=SCALE_CHECKS | {"mlp_bias": FLAG},
    gguf=GgufFormat(
        architecture="granite",
        permuted=True,
        config=_gguf_config,
        metadata=_gguf_metadata,
        rope_kinds=llama.GGUF.rope_kinds,
    ),
)
