"""Names and layouts of tensors in GGUF files and in HF checkpoints, in both directions.

Tensor names: llama.cpp's convert_hf_to_gguf.py. A family says the rest in its row (`GgufFormat`).
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from lljax.models.families.family import GgufFormat, SplitTensor

# HF names below the layer, of modules by their GGUF names, or of tensors if these end in the kind
# of the tensor. A file has the experts (*) of a layer in one tensor.
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
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # float32 in every file


class Place(NamedTuple):
    """Where a HF tensor is in a GGUF file: a tensor, or one of the experts in it."""

    name: str
    expert: int | None = None


def hf_name(name: str, format: GgufFormat) -> str:
    """The HF name of a GGUF tensor, with * for the number of an expert; the name itself if it has
    none.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if not match:
        stem, _, kind = name.rpartition(".")
        return f"{WHOLE.get(stem, stem)}.{kind}"
    layer, rest = LAYER | dict(format.names), match[2]
    stem, _, kind = rest.rpartition(".")
    return f"model.layers.{match[1]}.{layer.get(rest) or f'{layer.get(stem, stem)}.{kind}'}"


def gguf_places(name: str, format: GgufFormat) -> list[Place]:
    """Where a HF tensor is: the inverse of `hf_name`, of a name with a number. Nearly always one
    place; none if GGUF files have no such tensor.
    """
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if not match:
        whole = {hf: ours for ours, hf in WHOLE.items()}
        return [Place(f"{whole[stem]}.{kind}")] if stem in whole else []
    number = re.search(r"\.(\d+)\.", match[2])
    rest = match[2] if number is None else match[2].replace(number[0], ".*.", 1)
    stem, _, kind = rest.rpartition(".")
    names: dict[str, list[str]] = {}
    for ours, hf in (LAYER | dict(format.names)).items():
        names.setdefault(hf, []).append(ours)
    found = names.get(rest) or [f"{ours}.{kind}" for ours in names.get(stem, ())]
    if found and (stem not in format.splits):
        found = found[-1:]  # the family's own
    expert = None if number is None else int(number[1])
    return [Place(f"blk.{match[1]}.{ours}", expert) for ours in found]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The values of tensors of a model with N query heads and K key/value heads. Tensors are named
    by their HF names.
    """

    format: GgufFormat
    N: int
    K: int

    def splits(self, name: str) -> SplitTensor | None:
        """How files split a tensor; None if they do not."""
        module = re.fullmatch(r"model\.layers\.\d+\.(.+)\.weight", name)
        return self.format.splits.get(module[1]) if module else None

    def to_hf(self, name: str, array: np.ndarray) -> np.ndarray:
        """A tensor of a GGUF file as HF has it."""
        if heads := self._heads(name):  # interleaved pairs become two halves
            array = _swap(array, heads, (array.shape[0] // heads // 2, 2))
        array = array.reshape(self.hf_shape(name, array.shape))
        return array - 1 if self._adds_one(name) else array

    def to_gguf(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_hf`."""
        if heads := self._heads(name):
            array = _swap(array, heads, (2, array.shape[0] // heads // 2))
        array = array.reshape(self.gguf_shape(name, array.shape))
        return array.astype(np.float32) + 1 if self._adds_one(name) else array

    def hf_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that HF has of a tensor of this shape in a file."""
        return (1, *shape[-1:]) if name.endswith(self.format.one_row) else shape

    def gguf_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of `hf_shape`."""
        return shape[-1:] if name.endswith(self.format.one_row) else shape

    def _heads(self, name: str) -> int | None:
        """The heads whose rows are permuted: of q and k, in some families."""
        heads = {"q_proj": self.N, "k_proj": self.K} if self.format.permuted else {}
        return heads.get(name.split(".")[-2])

    def _adds_one(self, name: str) -> bool:
        return self.format.norms_plus_one and name.endswith("norm.weight")


def _swap(array: np.ndarray, heads: int, parts: tuple[int, int]) -> np.ndarray:
    """The rows of every head, viewed as `parts`, in the transposed order."""
    return array.reshape(heads, *parts, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
