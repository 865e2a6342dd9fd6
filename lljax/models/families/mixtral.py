"""Mixtral: experts in every layer (Jiang et al. 2024, arXiv 2401.04088); transformers
`models/mixtral/modeling_mixtral.py`.

Its GGUF files call themselves llama; those with experts are read as Mixtral.
"""

import dataclasses
from typing import Any

from lljax.models.families import llama
from lljax.models.families.family import (
    Family,
    Metadata,
    first_set,
    sliding_window,
    uniform_layers,
)
from lljax.models.spec import LayerSpec, MoESpec

GGUF_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "moe": MoESpec(
            E=first_set(c, "num_local_experts"),
            k=first_set(c, "num_experts_per_tok"),
            F=c["intermediate_size"],
            normalize=True,
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
        "layers": uniform_layers(c, LayerSpec(window=sliding_window(c), moe=True)),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {
        "num_local_experts": metadata("expert_count"),
        "num_experts_per_tok": metadata("expert_used_count"),
        "sliding_window": None,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    decoder=_decoder,
    peft_experts=True,
    gguf=dataclasses.replace(llama.GGUF, experts=True, names=GGUF_EXPERTS, config=_gguf_config),
)
