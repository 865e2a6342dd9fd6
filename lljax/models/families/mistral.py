"""Mistral: a sliding window in every layer (Jiang et al. 2023, arXiv 2310.06825); transformers
`models/mistral/modeling_mistral.py`. With `layer_types` in config.json, transformers takes it for
a Ministral: full attention in some layers.

Its GGUF files call themselves llama, and are read as such: without a window.
"""

from typing import Any

from lljax.models.families import llama
from lljax.models.families.family import (
    INSIDE,
    WRAPPED,
    Family,
    MultimodalModel,
    local_layers,
    sliding_window,
)
from lljax.models.spec import LayerSpec

# Of Mistral Small 3.x, Magistral and Devstral, Ministral 3, and Mistral Small 4.
MISTRAL3 = MultimodalModel(model_type="mistral3", names=(INSIDE, WRAPPED), tied=True)


def _decoder(c: dict) -> dict[str, Any]:
    window = sliding_window(c)
    slides = local_layers(c, lambda i: window)
    return {"layers": tuple(LayerSpec(window=window if local else None) for local in slides)}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    decoder=_decoder,
    gguf=llama.GGUF_WRITTEN,
    multimodal_parents=(MISTRAL3,),
)
