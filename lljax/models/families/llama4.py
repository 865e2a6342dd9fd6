"""Llama 4, its text model: chunked attention, layers without RoPE, experts; transformers
`models/llama4/modeling_llama4.py`.
"""

from typing import Any

from lljax.models.families.family import (
    WRAPPED,
    Family,
    MultimodalModel,
    first_set,
    local_layers,
    rotated_layers,
)
from lljax.models.rope import Temperature
from lljax.models.spec import LayerSpec, MoESpec
from lljax.models.values import FLAG, NUMBER, Value, list_of, optional, whole


def _layers(c: dict) -> tuple[LayerSpec, ...]:
    """Every fourth layer has no RoPE and full attention; experts in every layer or every second."""
    L, chunk = c["num_hidden_layers"], first_set(c, "attention_chunk_size")
    step, rotated = first_set(c, "interleave_moe_layer_step"), rotated_layers(c)
    local = local_layers(c, lambda i: rotated[i], "chunked_attention")
    sparse = range(step - 1, L, step) if c.get("moe_layers") is None else c["moe_layers"]
    return tuple(
        LayerSpec(
            window=chunk if local[i] else None,
            rope=0 if rotated[i] else None,
            moe=i in sparse,
            chunked=local[i],
        )
        for i in range(L)
    )


def _experts(c: dict) -> MoESpec:
    F = c["intermediate_size"]
    return MoESpec(
        E=first_set(c, "num_local_experts"),
        k=first_set(c, "num_experts_per_tok"),
        F=F,
        score="sigmoid",
        best_first=True,
        on_input=True,
        fused="halves",
        shared=F,
        block="feed_forward",
        router="router",
        shared_name="shared_expert",
    )


def _decoder(c: dict) -> dict[str, Any]:
    tuning = c["attn_temperature_tuning"]
    temperature = Temperature(c["attn_scale"], c["floor_scale"], first=1, rotated=False)
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "interleaved": True,
        "qk_unit": c["use_qk_norm"],
        "temperature": temperature if tuning else None,
        "moe": _experts(c),
        "layers": _layers(c),
        "F": first_set(c, "intermediate_size_mlp"),
    }


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 16_384,
    },
    decoder=_decoder,
    checks={
        "use_qk_norm": FLAG,
        "attn_temperature_tuning": Value(lambda x: type(x) in (bool, int), "true or false"),
        "attn_scale": NUMBER,
        "floor_scale": NUMBER,
        "no_rope_layers": optional(list_of(whole(0))),
        "moe_layers": optional(list_of(whole(0))),
    },
    multimodal_parents=(
        # Llama4ForConditionalGeneration of transformers 5.24 reads an attribute that is not there.
        MultimodalModel(model_type="llama4", names=(WRAPPED,), text_adapters=True),
    ),
)
