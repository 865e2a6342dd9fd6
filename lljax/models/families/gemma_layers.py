"""Layers, norms and scales that the Gemma families share."""

from typing import Any

from lljax.models.families.family import local_layers
from lljax.models.spec import Norms
from lljax.models.values import NUMBER, optional

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
CHECKS = {
    "query_pre_attn_scalar": NUMBER,
    "attn_logit_softcapping": optional(NUMBER),
    "final_logit_softcapping": optional(NUMBER),
}
NORMS = Norms(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def gguf_query_scalar(config: dict, *, layers_of_27b: int) -> int:
    """The query_pre_attn_scalar that GGUF files leave out; the 27B model alone scales by D / N."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def decoder_fields(c: dict) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "norms": NORMS,
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "embed_scale": c["hidden_size"] ** 0.5,
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": c["final_logit_softcapping"],
    }


def sliding_layers(c: dict, period: int) -> list[bool]:
    """Whether every layer slides: all except every `period`-th, or as `layer_types` says."""
    return local_layers(c, lambda i: (i + 1) % period)
