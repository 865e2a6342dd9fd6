"""Tiny random multimodal models as transformers makes them, whose text models are read here."""

from pathlib import Path

import safetensors.numpy
import torch
import transformers
from families import (
    DELTA,
    EXPERTS_AND_ONE_FOR_ALL,
    EXPERTS_BESIDE,
    GEMMA,
    GEMMA4,
    KEYS_AS_VALUES,
    LATENT,
    LOCAL_AND_GLOBAL,
    SIGMOID,
    SIZES,
)

M_ROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# By model_type: the classes of config and model, text_config, vision_config.
MODELS = {
    "gemma3": (
        transformers.Gemma3Config,
        transformers.Gemma3ForConditionalGeneration,
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": LOCAL_AND_GLOBAL,
            "final_logit_softcapping": None,  # which the whole model does not apply
        },
        SIGLIP | {"model_type": "siglip_vision_model"},
    ),
    "gemma4": (
        transformers.Gemma4Config,
        transformers.Gemma4ForConditionalGeneration,
        GEMMA4 | KEYS_AS_VALUES | EXPERTS_BESIDE | {"use_bidirectional_attention": "vision"},
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
    ),
    "gemma4_unified": (
        transformers.Gemma4UnifiedConfig,
        transformers.Gemma4UnifiedForConditionalGeneration,
        {
            name: value
            for name, value in (GEMMA4 | KEYS_AS_VALUES).items()
            if name != "hidden_size_per_layer_input"
        },
        {"mm_embed_dim": 16, "mm_posemb_size": 4, "patch_size": 2},
    ),
    "mistral3": (
        transformers.Mistral3Config,
        transformers.Mistral3ForConditionalGeneration,
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        SIGLIP | {"model_type": "pixtral", "head_dim": 8},
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        {"head_dim": 8, "rope_parameters": M_ROPE | {"mrope_interleaved": True}},
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        {"rope_parameters": M_ROPE},
        QWEN_VISION,
    ),
    "qwen3_vl_moe": (
        transformers.Qwen3VLMoeConfig,
        transformers.Qwen3VLMoeForConditionalGeneration,
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "rope_parameters": M_ROPE | {"mrope_interleaved": True},
        },
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": (
        transformers.Qwen3_5Config,
        transformers.Qwen3_5ForConditionalGeneration,
        DELTA | {"rope_parameters": M_ROPE | {"mrope_interleaved": True}},
        QWEN_VISION,
    ),
    "qwen3_5_moe": (
        transformers.Qwen3_5MoeConfig,
        transformers.Qwen3_5MoeForConditionalGeneration,
        DELTA | EXPERTS_AND_ONE_FOR_ALL | {"rope_parameters": M_ROPE | {"mrope_interleaved": True}},
        QWEN_VISION,
    ),
    "kimi_k25": (
        transformers.Kimi_K25Config,
        transformers.Kimi_K25ForConditionalGeneration,
        {"model_type": "kimi_k2"} | SIGMOID | LATENT,
        SIGLIP,
    ),
}
TOKENS = {  # of images and their borders: none is in the vocabulary of the text
    "image_token_id": 200,
    "video_token_id": 201,
    "vision_start_token_id": 202,
    "vision_end_token_id": 203,
}


def write_multimodal(folder, model_type: str, **text):
    """A random torch model, which is also saved to `folder` with float32 weights."""
    torch.manual_seed(0)
    config_class, model_class, fields, vision = MODELS[model_type]
    fields = SIZES | {"pad_token_id": 0, "eos_token_id": 1} | fields | text
    config = config_class(text_config=fields, vision_config=vision, tie_word_embeddings=False)
    for name, token in TOKENS.items():
        if hasattr(config, name):
            setattr(config, name, token)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    with torch.no_grad():
        saved = ("correction_bias", "layer_scalar")
        buffers = (b for name, b in model.named_buffers() if name.endswith(saved))
        for parameter in (*model.parameters(), *buffers):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if model_type == "kimi_k25":  # transformers 5.24 saves its own names of the vision model here
        rename(
            folder,
            lambda name: name.replace("language_model.model.blocks", "language_model.model.layers"),
        )
    return model


def rename(folder, change) -> None:
    """Changes the names of tensors on disk."""
    path = Path(folder) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    safetensors.numpy.save_file(renamed, path, metadata={"format": "pt"})
