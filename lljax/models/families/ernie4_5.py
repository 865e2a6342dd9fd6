"""ERNIE 4.5, its dense models: RoPE in interleaved pairs, biases everywhere or nowhere;
transformers `models/ernie4_5/modeling_ernie4_5.py`.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["use_bias"],
        "output_bias": c["use_bias"],
        "mlp_bias": c["use_bias"],
        "interleaved": True,
    }


FAMILY = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    decoder=_decoder,
    checks={"use_bias": FLAG},
    gguf=GgufFormat(architecture="ernie4_5"),
)
