"""OLMo 2: norms after attention and MLP only, and of whole queries and keys (arXiv 2501.00656);
transformers `models/olmo2/modeling_olmo2.py`.
"""

from typing import Any

from lljax.models.families.family import GGUF_NORMS_AFTER, NORMS_AFTER, Family, GgufFormat, Metadata
from lljax.models.spec import QKNorm

DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False}


def decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(whole=True),
        "norms": NORMS_AFTER,
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """In llama.cpp the head is a tensor of its own, and heads have the size D / N."""
    return {
        "tie_word_embeddings": False,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults=DEFAULTS,
    decoder=decoder,
    gguf=GgufFormat(architecture="olmo2", names=GGUF_NORMS_AFTER, config=_gguf_config),
)
