"""Phi-3 and Phi-4-mini: fused projections, longrope, in some models on a part of the head
(arXiv 2404.14219); transformers `models/phi3/modeling_phi3.py`.
"""

from typing import Any

from lljax.models.families.family import (
    Family,
    GgufFormat,
    Metadata,
    sliding_window,
    uniform_layers,
)
from lljax.models.rope.kinds import LISTS
from lljax.models.spec import DecoderSpec, LayerSpec, MLPNames


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "fused_qkv": True,
        "mlp": MLPNames(gate_up="gate_up_proj"),
        "layers": uniform_layers(c, LayerSpec(window=sliding_window(c))),
    }


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    """transformers 4 reads three fields of longrope alone, and both versions compute its factor
    from the lengths.
    """
    factor_of_lengths = (
        spec.rope.original_length * spec.rope.factor == entries["max_position_embeddings"]
    )
    if spec.rope.type == "longrope" and spec.rope.attention_factor is None and factor_of_lengths:
        lists = {name: entries["rope_parameters"][name] for name in LISTS}
        entries["rope_scaling"] = {"type": "longrope", **lists}
    return entries


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """In llama.cpp no layer slides, and heads have the size D / N."""
    return {
        "sliding_window": None,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "original_max_position_embeddings": metadata(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    decoder=_decoder,
    rope_to_hf=_rope_to_hf,
    rope_kinds=("longrope",),
    gguf=GgufFormat(
        architecture="phi3",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        partial=True,
        config=_gguf_config,
        rope_kinds=("default", "linear", "yarn", "longrope"),
    ),
)
