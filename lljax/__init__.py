"""lljax teaches a HuggingFace decoder LLM to read long documents, on TPU and GPU, with LongLoRA and
its successors.

Dimension letters: B batch, T query positions, S key positions, D model width, N query heads,
  K key/value heads, H head size, F MLP width, V vocabulary, R LoRA rank, L layers, G group size of
  shifted sparse attention.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lljax.api import export, generate, prepare_model, train

# transformers warns about PyTorch at import, and lljax needs no PyTorch.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

__all__ = ["export", "generate", "prepare_model", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use: jax takes seconds, and the help of a command needs none of it.
    if name in __all__:
        from lljax import api

        return getattr(api, name)
    raise AttributeError(f"module 'lljax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
