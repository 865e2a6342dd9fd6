"""Ministral 3: YaRN, and queries that grow with the position; transformers
`models/ministral3/modeling_ministral3.py`.
"""

from typing import Any

from lljax.models.families.family import (
    Family,
    GgufFormat,
    Metadata,
    sliding_window,
    uniform_layers,
)
from lljax.models.families.mistral import MISTRAL3
from lljax.models.families.position_temperature import BETA, rope_to_hf, temperature
from lljax.models.spec import DecoderSpec, LayerSpec
from lljax.models.values import NOT_NEGATIVE


def _decoder(c: dict) -> dict[str, Any]:
    return {
        "temperature": temperature(c),
        "layers": uniform_layers(c, LayerSpec(window=sliding_window(c))),
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    rope = config["rope_scaling"] or {"rope_type": "default"}
    weight = metadata("attention.temperature_scale", 0.0, NOT_NEGATIVE)
    return {"sliding_window": None, "rope_scaling": rope | {BETA: weight}}


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    """llama.cpp divides positions by the original length of the RoPE."""
    temperature = spec.temperature
    return {"attention.temperature_scale": temperature.weight} if temperature else {}


FAMILY = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    defaults={
        "max_position_embeddings": 262_144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            BETA: 0.1,
        },
    },
    decoder=_decoder,
    rope_to_hf=rope_to_hf,
    rope_kinds=("yarn",),  # transformers divides positions by the original length that yarn names
    gguf=GgufFormat(
        architecture="mistral3",
        permuted=True,
        yarn_log_multiplier=1.0,
        config=_gguf_config,
        metadata=_gguf_metadata,
    ),
    multimodal_parents=(MISTRAL3,),
)
