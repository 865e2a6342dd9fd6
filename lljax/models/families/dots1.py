"""dots.llm1: Qwen3's attention, experts by sigmoid scores (arXiv 2506.05767); transformers
`models/dots1/modeling_dots1.py`.
"""

import dataclasses
from typing import Any

from lljax.models.families.family import (
    Family,
    GgufFormat,
    Metadata,
    local_layers,
    sliding_window,
)
from lljax.models.families.sigmoid_experts import (
    CHECKS,
    DEFAULTS,
    dense_first,
    gguf_experts,
    sigmoid_experts,
)
from lljax.models.spec import QKNorm
from lljax.models.values import whole


def _decoder(c: dict) -> dict[str, Any]:
    window = sliding_window(c)
    slides = local_layers(c, lambda i: window and i >= c["max_window_layers"])
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(),
        "moe": sigmoid_experts(c),
        "layers": tuple(
            dataclasses.replace(layer, window=window if local else None)
            for layer, local in zip(dense_first(c), slides, strict=True)
        ),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """llama.cpp has no sliding window here, and as many key/value heads as query heads."""
    return gguf_experts(metadata) | {
        "sliding_window": None,
        "num_key_value_heads": config["num_attention_heads"],
    }


FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "attention_bias": False,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 4096,
        "max_window_layers": 62,
    },
    decoder=_decoder,
    checks=CHECKS | {"max_window_layers": whole(0)},
    peft_experts=True,
    gguf=GgufFormat(architecture="dots1", experts=True, config=_gguf_config),
)
