"""ERNIE 4.5 with experts: softmax scores, chosen with a correction; transformers
`models/ernie4_5_moe/modeling_ernie4_5_moe.py`.
"""

from typing import Any

from lljax.errors import ModelError
from lljax.models.families.family import Family, GgufFormat, Metadata, first_set
from lljax.models.spec import DecoderSpec, LayerSpec, MoESpec
from lljax.models.values import FLAG, Value, whole

TINY = Value(lambda x: type(x) in (int, float) and 0 <= x <= 1e-6, "a number from 0 to 1e-6")


def _experts(c: dict) -> MoESpec:
    F = first_set(c, "moe_intermediate_size")
    return MoESpec(
        E=first_set(c, "moe_num_experts", "num_experts"),
        k=first_set(c, "moe_k", "num_experts_per_tok"),
        F=F,
        correction=True,
        normalize=True,
        shared=F * c["moe_num_shared_experts"],
        correction_name="moe_statics.e_score_correction_bias",
        correction_axes=2,
    )


def _decoder(c: dict) -> dict[str, Any]:
    if c["use_bias"]:
        raise ModelError("config.json: use_bias=true is not supported; a head has no bias here")
    L, interval = c["num_hidden_layers"], c["moe_layer_interval"]
    first, last = c["moe_layer_start_index"], c["moe_layer_end_index"]
    last = L - 1 if last == -1 else last
    return {
        "interleaved": True,
        "moe": _experts(c),
        "layers": tuple(
            LayerSpec(moe=(i + 1) % interval == 0 and first <= i <= last) for i in range(L)
        ),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """llama.cpp reads tensors of experts in every layer from the first with experts on."""
    F = metadata("expert_feed_forward_length")
    return {
        "moe_num_experts": metadata("expert_count"),
        "moe_k": metadata("expert_used_count"),
        "moe_intermediate_size": F,
        "moe_num_shared_experts": metadata("expert_shared_feed_forward_length", 0, whole(0)) // F,
        "moe_layer_start_index": metadata("leading_dense_block_count", 0, whole(0)),
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1}


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    },
    decoder=_decoder,
    checks={
        "use_bias": FLAG,
        "moe_num_shared_experts": whole(0),
        "moe_layer_start_index": whole(0),
        "moe_layer_end_index": whole(-1),
        "moe_layer_interval": whole(1),
        "moe_norm_min": TINY,  # the weights of the experts are divided by no less
    },
    peft_experts=True,
    gguf=GgufFormat(
        architecture="ernie4_5-moe",
        experts=True,
        names={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
        one_row=("e_score_correction_bias",),
        config=_gguf_config,
        metadata=_gguf_metadata,
    ),
)
