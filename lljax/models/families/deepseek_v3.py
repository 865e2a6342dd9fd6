"""DeepSeek-V3 and R1, Kimi K2: multi-head latent attention, experts by sigmoid scores (DeepSeek-AI
2024, arXiv 2412.19437); transformers `models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import math
from typing import Any

import numpy as np

from lljax.models.families import latent_attention
from lljax.models.families.family import (
    INSIDE,
    WRAPPED,
    Family,
    GgufFormat,
    Metadata,
    MultimodalModel,
    SplitTensor,
)
from lljax.models.families.sigmoid_experts import (
    CHECKS,
    DEFAULTS,
    dense_first,
    gguf_experts,
    sigmoid_experts,
)
from lljax.models.spec import DecoderSpec
from lljax.models.values import Value

EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps is
MULTIPLIER = 0.1  # yarn_log_multiplier of GGUF files, for an mscale_all_dim of 1
AS_MULTIPLIER = Value(
    lambda x: type(x) in (int, float) and math.isclose(x, MULTIPLIER, rel_tol=1e-6),
    f"{MULTIPLIER}, for an mscale_all_dim of 1, as in all released models",
)
LATENT_EPS = Value(
    lambda x: type(x) in (int, float) and math.isclose(x, EPS, rel_tol=1e-6),
    f"{EPS}, the epsilon of the norms of latents",
)
ONE = Value(lambda x: x == 1, "1")


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "moe": sigmoid_experts(c),
        **latent_attention.latent_attention(c, dense_first(c)),
    }


def _split_kv(kernel: np.ndarray, spec: DecoderSpec) -> tuple[np.ndarray, np.ndarray]:
    """kv_b_proj [N (H - rope + v), rank] as keys [N, rank, H - rope] and values [N, v, rank]."""
    assert spec.mla is not None
    of_heads = kernel.reshape(spec.N, -1, kernel.shape[-1])
    return of_heads[:, : -spec.mla.v].swapaxes(1, 2), of_heads[:, -spec.mla.v :]


def _join_kv(parts: list[np.ndarray]) -> np.ndarray:
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """llama.cpp gives the norms of latents the epsilon of the others, and takes scores of stretched
    positions times the square of a magnitude that no file without yarn_log_multiplier names.
    """
    metadata("attention.layer_norm_rms_epsilon", wanted=LATENT_EPS)
    metadata("rope.scaling.attn_factor", 1.0, ONE)
    stretched = (config["rope_scaling"] or {}).get("rope_type") == "yarn"
    metadata("rope.scaling.yarn_log_multiplier", None if stretched else MULTIPLIER, AS_MULTIPLIER)
    L, V = config["num_hidden_layers"], config["vocab_size"]
    rotated = metadata("rope.dimension_count")
    whole_queries = L in (26, 27) or (L == 48 and V == 128_256)  # as llama.cpp tells these models
    return gguf_experts(metadata) | {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotated,
        "partial_rotary_factor": None,
        "q_lora_rank": None if whole_queries else metadata("attention.q_lora_rank"),
        "kv_lora_rank": metadata("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": metadata("attention.key_length_mla") - rotated,
        "v_head_dim": metadata("attention.value_length_mla"),
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    """The keys and values of all heads are one head of the latent."""
    mla = spec.mla
    assert mla is not None
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": mla.kv_rank + mla.rope,
        "attention.value_length": mla.kv_rank,
        "attention.key_length_mla": spec.H,
        "attention.value_length_mla": mla.v,
        "attention.kv_lora_rank": mla.kv_rank,
        "rope.dimension_count": mla.rope,
    } | ({"attention.q_lora_rank": mla.q_rank} if mla.q_rank else {})


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults=DEFAULTS | latent_attention.DEFAULTS | {"max_position_embeddings": 4096},
    decoder=_decoder,
    checks=CHECKS | latent_attention.CHECKS,
    peft_experts=True,
    gguf=GgufFormat(
        architecture="deepseek2",
        experts=True,
        names={
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_k_b": "self_attn.kv_b_proj",
            "attn_v_b": "self_attn.kv_b_proj",
        },
        splits={"self_attn.kv_b_proj": SplitTensor(_split_kv, _join_kv)},
        yarn_log_multiplier=MULTIPLIER,
        partial=True,
        config=_gguf_config,
        metadata=_gguf_metadata,
        rope_kinds=("default", "yarn"),
    ),
    multimodal_parents=(
        MultimodalModel(model_type="kimi_k25", names=(INSIDE, WRAPPED), tied=True),
    ),
    aliases={"kimi_k2": {}},
)
