"""Mistral: a sliding window in every layer (Jiang et al. 2023, arXiv 2310.06825); transformers
`models/mistral/modeling_mistral.py`.

Its GGUF files call themselves llama, and are read as such: without a window.
"""

from typing import Any

from lljax.models.families import llama
from lljax.models.families.family import Family, sliding_window, uniform_layers
from lljax.models.spec import LayerSpec


def _decoder(c: dict) -> dict[str, Any]:
    return {"layers": uniform_layers(c, LayerSpec(window=sliding_window(c)))}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    decoder=_decoder,
    gguf=llama.GGUF,
)
