"""lljax teaches an existing HuggingFace decoder LLM to read long documents, the LongLoRA way, on
TPU and GPU.

Letters used throughout: B batch, T query positions, S key positions, D model width, N query heads,
  K key/value heads, H head size, F MLP width, V vocabulary, R LoRA rank, L layers, G group size of
  shifted sparse attention.
"""

import logging

# transformers warns of this at import, and lljax needs no PyTorch.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

__all__ = ["export", "generate", "prepare_model", "train"]


def __getattr__(name: str):
    # Imported on first use: jax takes seconds, and the help of a script needs none of it.
    if name in __all__:
        from lljax import api

        return getattr(api, name)
    raise AttributeError(f"module 'lljax' has no attribute {name!r}")
