"""Mixtral: experts in every layer (Jiang et al. 2024, arXiv 2401.04088); transformers
`models/mixtral/modeling_mixtral.py`.
"""

from typing import Any

from lljax.models.families.family import Family, first_set, sliding_window, uniform_layers
from lljax.models.spec import LayerSpec, MoESpec


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
)
