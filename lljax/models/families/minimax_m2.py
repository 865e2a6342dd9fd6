"""MiniMax-M2: norms of whole queries and keys, RoPE on a part of the head, experts by sigmoid
scores under Mixtral's names; transformers `models/minimax_m2/modeling_minimax_m2.py`.
"""

from typing import Any

from lljax.models.families.family import Family, GgufFormat, Metadata, first_set, uniform_layers
from lljax.models.families.mixtral import GGUF_EXPERTS
from lljax.models.families.sigmoid_experts import SIGMOID
from lljax.models.spec import LayerSpec, MoESpec, QKNorm
from lljax.models.values import optional, whole


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "qk_norm": QKNorm(whole=True),
        "moe": MoESpec(
            E=first_set(c, "num_local_experts", "num_experts"),
            k=first_set(c, "num_experts_per_tok"),
            F=c["intermediate_size"],
            score="sigmoid",
            correction=True,
            normalize=True,
            block="block_sparse_moe",
            correction_name="e_score_correction_bias",
            projections=("w1", "w3", "w2"),
        ),
        "layers": uniform_layers(c, LayerSpec(moe=True)),
    }


def _ropes(c: dict) -> tuple[dict, ...]:
    """Released checkpoints say in `rotary_dim` how many dimensions RoPE rotates."""
    rotated = c.get("rotary_dim")
    if rotated is None or c.get("partial_rotary_factor") is not None:
        return (c,)
    return (c | {"partial_rotary_factor": rotated / c["head_dim"]},)


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """In llama.cpp the head is a tensor of its own."""
    metadata("expert_gating_func", wanted=SIGMOID)
    return {
        "num_local_experts": metadata("expert_count"),
        "num_experts_per_tok": metadata("expert_used_count"),
        "tie_word_embeddings": False,
    }


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    defaults={
        "max_position_embeddings": 196_608,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rope_theta": 5_000_000.0,
    },
    decoder=_decoder,
    checks={"rotary_dim": optional(whole(2)), "head_dim": whole(1)},
    ropes=_ropes,
    peft_experts=True,
    gguf=GgufFormat(
        architecture="minimax-m2",
        experts=True,
        names=GGUF_EXPERTS | {"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"},
        partial=True,
        config=_gguf_config,
    ),
)
