"""Granite 4, its dense models with attention in every layer; transformers
`models/granitemoehybrid/modeling_granitemoehybrid.py`.
"""

from typing import Any

from lljax.errors import ModelError, short
from lljax.models.families import granite
from lljax.models.families.family import Family, first_set, per_layer, uniform_layers
from lljax.models.spec import LayerSpec, MLPNames
from lljax.models.values import WORD, optional, whole

ATTENTION = ("attention", "full_attention")


def _decoder(c: dict) -> dict[str, Any]:
    _check_dense(c)
    rope = 0 if c.get("position_embedding_type") == "rope" else None
    return granite.scales(c) | {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "layers": uniform_layers(c, LayerSpec(rope=rope)),
        "F": first_set(c, "shared_intermediate_size"),
        "mlp": MLPNames("shared_mlp", gate_up="input_linear", down="output_linear"),
    }


def _check_dense(c: dict) -> None:
    """Raises ModelError for a model with Mamba layers or experts."""
    name = "layer_types" if c.get("layer_types") else "layers_block_type"
    for i, kind in enumerate(per_layer(c, name, lambda i: "mamba")):
        if kind not in ATTENTION:
            raise ModelError(
                f"config.json: {name}[{i}] {short(kind)} is not supported; of Granite 4, models "
                "with attention in every layer are"
            )
    if c["num_local_experts"]:
        raise ModelError(
            f"config.json: num_local_experts={c['num_local_experts']} is not supported; of Granite "
            "4, models without experts are (num_local_experts=0)"
        )


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    defaults=granite.SCALE_DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
    },
    decoder=_decoder,
    checks=granite.SCALE_CHECKS
    | {"num_local_experts": whole(0), "position_embedding_type": optional(WORD)},
)
