"""lljax teaches an existing HuggingFace decoder LLM to read long documents, the LongLoRA way, on TPU and GPU.

Letters used throughout: B batch, T query positions, S key positions, D model width, N query heads, K key/value heads,
H head size, F MLP width, V vocabulary, R LoRA rank, L layers, G group size of shifted sparse attention.
"""

from lljax.api import export, generate, prepare_model, train

__all__ = ["export", "generate", "prepare_model", "train"]
