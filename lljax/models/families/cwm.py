"""CWM, Meta's code world model: three of four layers slide (FAIR 2025, arXiv 2510.02387);
transformers `models/cwm/modeling_cwm.py`.
"""

from typing import Any

from lljax.models.families.family import Family, local_layers, sliding_window
from lljax.models.spec import LayerSpec
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    slides, window = local_layers(c, lambda i: i % 4), sliding_window(c)
    return {
        "mlp_bias": c["mlp_bias"],
        "layers": tuple(LayerSpec(window=window if local else None) for local in slides),
    }


FAMILY = Family(
    model_type="cwm",
    architecture="CwmForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": 8192,
        "mlp_bias": False,
        "rope_theta": 1_000_000.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    decoder=_decoder,
    checks={"mlp_bias": FLAG},
)
