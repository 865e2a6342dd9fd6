"""Gemma 3, its text model: five of six layers slide, with a RoPE of their own (arXiv 2503.19786);
transformers `models/gemma3/modeling_gemma3.py`.
"""

from typing import Any

from lljax.errors import ModelError
from lljax.models import rope
from lljax.models.families import gemma_layers
from lljax.models.families.family import (
    INSIDE,
    WRAPPED,
    Family,
    GgufFormat,
    Metadata,
    MultimodalModel,
    sliding_window,
)
from lljax.models.spec import DecoderSpec, LayerSpec, QKNorm
from lljax.models.values import whole


def _decoder(c: dict) -> dict[str, Any]:
    slides, window = gemma_layers.sliding_layers(c, c["sliding_window_pattern"]), sliding_window(c)
    return gemma_layers.decoder_fields(c) | {
        "layers": tuple(
            LayerSpec(window=window, rope=1) if local else LayerSpec() for local in slides
        ),
        "qk_norm": QKNorm(),
    }


def _ropes(c: dict) -> tuple[dict, ...]:
    """config.json with the RoPE of the global layers alone, and with the RoPE of the local layers.

    Its max_position_embeddings includes a linear factor, as vLLM takes it; other families' does not
    (lljax.models.rope.to_hf).

    Raises:
      ModelError: rope_parameters is not an object for each type of layer.
    """
    given = {kind: of or {} for kind, of in (c.get("rope_parameters") or {}).items()}
    if not all(isinstance(of, dict) for of in given.values()):
        raise ModelError(
            "config.json: rope_parameters of a gemma3_text model has an object for each of "
            "full_attention, sliding_attention"
        )
    main = {
        "rope_theta": c["rope_theta"],
        **given.get("full_attention", {}),
        **(c.get("rope_scaling") or {}),
    }
    local = {"rope_theta": c["rope_local_base_freq"], **given.get("sliding_attention", {})}
    kind, factor = main.get("rope_type", main.get("type")), main.get("factor")
    if kind == "linear" and isinstance(factor, (int, float)) and factor >= 1:
        c = c | {"max_position_embeddings": int(c["max_position_embeddings"] / factor)}
    # transformers looks for `truncate` outside of these objects, where it never is.
    return tuple(
        c | {"rope_parameters": parameters | {"truncate": True}, "rope_scaling": None}
        for parameters in (main, local)
    )


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    local = rope.to_hf(spec.more_ropes[0], spec.max_length)["rope_parameters"]
    if spec.rope.type == "linear":
        entries["max_position_embeddings"] = int(spec.rope.original_length * spec.rope.factor)
    return entries | {
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {
            "full_attention": entries["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": metadata("rope.freq_base", 1_000_000.0, rope.THETA),
        "query_pre_attn_scalar": gemma_layers.gguf_query_scalar(config, layers_of_27b=62),
        "sliding_window": metadata("attention.sliding_window"),
        "rope_local_base_freq": metadata("rope.freq_base_swa", 10_000.0, rope.THETA),
    }


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    """llama.cpp knows the rest: every sixth layer is global, scores are scaled by `H ** -0.5`."""
    window = next((layer.window for layer in spec.layers if layer.window), spec.max_length)
    return {
        "attention.sliding_window": window,
        "rope.freq_base_swa": float(spec.more_ropes[0].theta),
    }


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults=gemma_layers.DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    decoder=_decoder,
    checks=gemma_layers.CHECKS
    | {"sliding_window_pattern": whole(1), "rope_local_base_freq": rope.THETA},
    ropes=_ropes,
    rope_to_hf=_rope_to_hf,
    rope_fields=("rope_local_base_freq",),
    gguf=GgufFormat(
        architecture="gemma3",
        names=gemma_layers.GGUF_NAMES,
        norms_plus_one=True,
        dtype="bfloat16",  # its activations overflow float16
        config=_gguf_config,
        metadata=_gguf_metadata,
    ),
    multimodal_parents=(
        MultimodalModel(
            model_type="gemma3",
            names=(INSIDE, WRAPPED),
            tied=True,
            defaults={
                "vocab_size": 262_208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
            },
        ),
    ),
)
