"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1), as DeepSeek-V3 has
it.
"""

import dataclasses
from typing import Any

from lljax.models.families.family import first_set
from lljax.models.spec import LayerSpec, MLASpec
from lljax.models.values import FLAG

DEFAULTS = {"attention_bias": False, "rope_interleave": True}
CHECKS = {"rope_interleave": FLAG}


def latent_attention(c: dict, layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    """The fields of DecoderSpec, with this attention in every layer."""
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "mla": MLASpec(
            q_rank=None if c.get("q_lora_rank") is None else first_set(c, "q_lora_rank"),
            kv_rank=first_set(c, "kv_lora_rank"),
            rope=first_set(c, "qk_rope_head_dim"),
            v=first_set(c, "v_head_dim"),
        ),
        "interleaved": c["rope_interleave"],
        "layers": tuple(dataclasses.replace(layer, mixer="mla") for layer in layers),
    }
