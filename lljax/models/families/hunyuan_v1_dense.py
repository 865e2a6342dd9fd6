"""Hunyuan, the dense models of 2025: norms of queries and keys after RoPE, whose base a fixed
`alpha` stretches; transformers `models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py`.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat
from lljax.models.rope import THETA
from lljax.models.spec import DecoderSpec, QKNorm
from lljax.models.values import NUMBER, check, optional

DEFAULT_THETA = 10_000.0


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(after_rope=True, names=("query_layernorm", "key_layernorm")),
    }


def _ropes(c: dict) -> tuple[dict, ...]:
    """With `alpha`, RoPE is called dynamic and is not: NTK-aware scaling by a fixed factor, which
    is no scaling of a larger base.
    """
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    check(given, {"alpha": optional(NUMBER), "rope_theta": THETA}, "config.json: rope_parameters")
    if given.get("rope_type", given.get("type")) != "dynamic" or not given.get("alpha"):
        return (c,)
    H = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    theta = given.get("rope_theta", c["rope_theta"]) * given["alpha"] ** (H / (H - 2))
    stretched = {"rope_type": "default", "rope_theta": theta}
    return (c | {"rope_parameters": stretched, "rope_scaling": None},)


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    """Without a scaling, in place of the one that names `alpha`."""
    return {"rope_scaling": None} | entries


FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "rope_theta": DEFAULT_THETA,
    },
    decoder=_decoder,
    ropes=_ropes,
    rope_to_hf=_rope_to_hf,
    gguf=GgufFormat(
        architecture="hunyuan-dense",
        names={
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
    ),
)
