"""SmolLM3: Llama with every fourth layer without RoPE (NoPE, Yang et al. 2025, arXiv 2501.18795);
transformers `models/smollm3/modeling_smollm3.py`.
"""

from typing import Any

from lljax.models.families.family import (
    Family,
    GgufFormat,
    local_layers,
    rotated_layers,
    sliding_window,
)
from lljax.models.spec import LayerSpec
from lljax.models.values import FLAG, list_of, optional, whole


def _layers(c: dict) -> tuple[LayerSpec, ...]:
    """By default, the layers without RoPE slide if `use_sliding_window` is on."""
    rotated = rotated_layers(c)
    window = sliding_window(c) if c["use_sliding_window"] else None
    slides = local_layers(c, lambda i: window and not rotated[i])
    return tuple(
        LayerSpec(window=window if local else None, rope=0 if turns else None)
        for local, turns in zip(slides, rotated, strict=True)
    )


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
        "layers": _layers(c),
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    },
    decoder=_decoder,
    checks={
        "mlp_bias": FLAG,
        "use_sliding_window": FLAG,
        "no_rope_layers": optional(list_of(whole(0))),
    },
    gguf=GgufFormat(architecture="smollm3", permuted=True),  # every fourth layer has no RoPE there
)
