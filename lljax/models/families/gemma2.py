"""Gemma 2: every second layer slides, soft-capped scores and logits (arXiv 2408.00118);
transformers `models/gemma2/modeling_gemma2.py`.
"""

from typing import Any

from lljax.models.families import gemma_layers
from lljax.models.families.family import Family, GgufFormat, Metadata, sliding_window
from lljax.models.spec import DecoderSpec, LayerSpec
from lljax.models.values import NUMBER


def _decoder(c: dict) -> dict[str, Any]:
    slides, window = gemma_layers.sliding_layers(c, 2), sliding_window(c)
    return gemma_layers.decoder_fields(c) | {
        "layers": tuple(LayerSpec(window=window if local else None) for local in slides),
        "attention_softcap": c["attn_logit_softcapping"],
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": gemma_layers.gguf_query_scalar(config, layers_of_27b=46),
        "sliding_window": metadata("attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata("attn_logit_softcapping", 50.0, NUMBER),
        "final_logit_softcapping": metadata("final_logit_softcapping", 30.0, NUMBER),
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    window = next((layer.window for layer in spec.layers if layer.window), spec.max_length)
    caps = {
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logit_softcap,
    }
    return {"attention.sliding_window": window} | {
        name: float(cap) for name, cap in caps.items() if cap is not None
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
    gguf=GgufFormat(
        architecture="gemma2",
        names=gemma_layers.GGUF_NAMES,
        norms_plus_one=True,
        dtype="bfloat16",  # its activations overflow float16
        config=_gguf_config,
        metadata=_gguf_metadata,
    ),
)
