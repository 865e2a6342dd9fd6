"""Layers that Qwen3-Next and Qwen3.5 share: gated delta networks, and gated attention in every
fourth layer.
"""

from typing import Any

from lljax.errors import ModelError, short
from lljax.models.families.family import per_layer
from lljax.models.spec import DeltaSpec, LayerSpec, QKNorm
from lljax.models.values import whole

DEFAULTS = {
    "max_position_embeddings": 32_768,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
CHECKS = {
    "full_attention_interval": whole(1),
    "linear_conv_kernel_dim": whole(2),
    **dict.fromkeys(
        (
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        whole(1),
    ),
}
MIXERS = {"linear_attention": "gated_delta", "full_attention": "gated_attention"}


def decoder_fields(c: dict, *, fused: bool) -> dict[str, Any]:
    """The fields of DecoderSpec but those of experts. fused: see `DeltaSpec`.

    Raises:
      ModelError: a type of layer that is none of MIXERS, or heads that do not divide.
    """
    return {
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "qk_norm": QKNorm(),
        "norm_plus_one": True,
        "delta": _delta(c, fused),
        "layers": _layers(c),
    }


def _delta(c: dict, fused: bool) -> DeltaSpec:
    M, heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    if heads % M:
        raise ModelError(
            f"config.json: linear_num_value_heads={heads} is no multiple of "
            f"linear_num_key_heads={M}"
        )
    return DeltaSpec(
        M=M,
        R=heads // M,
        k=c["linear_key_head_dim"],
        v=c["linear_value_head_dim"],
        taps=c["linear_conv_kernel_dim"],
        fused=fused,
    )


def _layers(c: dict) -> tuple[LayerSpec, ...]:
    interval = c["full_attention_interval"]
    types = per_layer(
        c,
        "layer_types",
        lambda i: "linear_attention" if (i + 1) % interval else "full_attention",
    )
    for i, kind in enumerate(types):
        if kind not in MIXERS:
            raise ModelError(
                f"config.json: layer_types[{i}] {short(kind)} is none of {', '.join(MIXERS)}"
            )
    return tuple(
        LayerSpec(mixer=MIXERS[kind], rope=0 if kind == "full_attention" else None)
        for kind in types
    )
