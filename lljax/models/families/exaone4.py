"""EXAONE 4: norms after attention and MLP only, and if some layers slide, RoPE in them alone (arXiv
2507.11407); transformers `models/exaone4/modeling_exaone4.py`.
"""

from typing import Any

from lljax.models.families.family import (
    GGUF_NORMS_AFTER,
    NORMS_AFTER,
    Family,
    GgufFormat,
    Metadata,
    local_layers,
    sliding_window,
    uniform_layers,
)
from lljax.models.spec import DecoderSpec, LayerSpec, QKNorm
from lljax.models.values import check, whole


def _layers(c: dict) -> tuple[LayerSpec, ...]:
    window, period = sliding_window(c), c["sliding_window_pattern"]
    if window is None:
        return uniform_layers(c, LayerSpec())
    if not c.get("layer_types"):  # else the pattern, which may be a word, says nothing new
        check(c, {"sliding_window_pattern": whole(1)})
    slides = local_layers(c, lambda i: (i + 1) % period)
    return tuple(LayerSpec(window=window) if local else LayerSpec(rope=None) for local in slides)


def _decoder(c: dict) -> dict[str, Any]:
    return {"qk_norm": QKNorm(), "norms": NORMS_AFTER, "layers": _layers(c)}


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """In llama.cpp the layers of the 32B model alone slide, all except every fourth."""
    slides = config["num_hidden_layers"] == 64
    return {
        "sliding_window": metadata("attention.sliding_window", 4096) if slides else None,
        "sliding_window_pattern": 4,
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    windows = {layer.window for layer in spec.layers if layer.window}
    return {"attention.sliding_window": max(windows)} if windows else {}


FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    decoder=_decoder,
    gguf=GgufFormat(
        architecture="exaone4",
        names=GGUF_NORMS_AFTER,
        config=_gguf_config,
        metadata=_gguf_metadata,
        rope_kinds=("default", "linear", "yarn", "llama3"),
    ),
)
