"""Names and layouts of tensors in GGUF files and in HF checkpoints, in both directions.

Tensor names: llama.cpp's convert_hf_to_gguf.py. A family says the rest in its row (`GgufFormat`).
"""

import dataclasses
import re

import numpy as np

from lljax.models.families.family import GgufFormat

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str, format: GgufFormat) -> str:
    """The HF name of a GGUF tensor; the name itself if it has none."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer = LAYER | dict(format.names)
        return f"model.layers.{match[1]}.{layer.get(match[2], match[2])}.{kind}"
    return f"{WHOLE.get(stem, stem)}.{kind}"


def gguf_name(name: str, format: GgufFormat) -> str | None:
    """The GGUF name of a HF tensor; None if GGUF files have no such tensor."""
    stem, _, kind = name.rpartition(".")
    names = {hf: ours for ours, hf in (LAYER | dict(format.names)).items()}
    if match := re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem):
        return f"blk.{match[1]}.{names[match[2]]}.{kind}" if match[2] in names else None
    whole = {hf: ours for ours, hf in WHOLE.items()}
    return f"{whole[stem]}.{kind}" if stem in whole else None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The values of tensors of a model with N query heads and K key/value heads. Tensors are named
    by their HF names.
    """

    format: GgufFormat
    N: int
    K: int

    def to_hf(self, name: str, array: np.ndarray) -> np.ndarray:
        """A tensor of a GGUF file as HF has it."""
        if heads := self._heads(name):  # interleaved pairs become two halves
            array = _swap(array, heads, (array.shape[0] // heads // 2, 2))
        return array - 1 if self._adds_one(name) else array

    def to_gguf(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_hf`."""
        if heads := self._heads(name):
            array = _swap(array, heads, (2, array.shape[0] // heads // 2))
        return array.astype(np.float32) + 1 if self._adds_one(name) else array

    def _heads(self, name: str) -> int | None:
        """The heads whose rows are permuted: of q and k, in some families."""
        heads = {"q_proj": self.N, "k_proj": self.K} if self.format.permuted else {}
        return heads.get(name.split(".")[-2])

    def _adds_one(self, name: str) -> bool:
        return self.format.norms_plus_one and name.endswith("norm.weight")


def _swap(array: np.ndarray, heads: int, parts: tuple[int, int]) -> np.ndarray:
    """The rows of every head, viewed as `parts`, in the transposed order."""
    return array.reshape(heads, *parts, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
