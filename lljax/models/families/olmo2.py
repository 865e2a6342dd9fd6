"""OLMo 2: norms after attention and MLP only, and of whole queries and keys (arXiv 2501.00656);
transformers `models/olmo2/modeling_olmo2.py`.
"""

from typing import Any

from lljax.models.families.family import NORMS_AFTER, Family
from lljax.models.spec import QKNorm

DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False}


def decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(whole=True),
        "norms": NORMS_AFTER,
    }


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults=DEFAULTS,
    decoder=decoder,
)
