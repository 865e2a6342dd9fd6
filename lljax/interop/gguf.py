"""A GGUF file as a base: dequantised tensor by tensor, its metadata read into HF form.

Key names: the `gguf` package's constants. Tensor names and the q/k permutation: llama.cpp's convert_hf_to_gguf.py.
"""

import functools
import hashlib
import re
from pathlib import Path

import gguf
import numpy as np

from lljax.errors import ModelError
from lljax.interop import gguf_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")              # Mistral models call themselves llama
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GgufBase:
    """The interface of lljax.interop.base.FolderBase over one GGUF file."""

    def __init__(self, path: str, file: Path):
        self.path, self.file = path, file
        try:
            self._reader = gguf.GGUFReader(file)
            self._tensors = {_hf_name(t.name): t for t in self._reader.tensors if t.name != "rope_freqs.weight"}
        except ModelError:
            raise
        except Exception as error:           # the package raises whatever the damage leads it to
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"{path}: not a GGUF file that can be read ({reason})") from None
        self.config = self._config()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(x) for x in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float16)          # what an export writes where a tensor did not change

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"{self.path}: tensor {name!r} of type {tensor.tensor_type.name} cannot be dequantised "
                             f"({error})") from None
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and self._architecture == "llama":
            array = _unpermute(array, self.config[heads])
        return array

    def fingerprint(self) -> str:
        """sha256 over the size and the first MiB, which hold the metadata and the table of tensors."""
        with open(self.file, "rb") as opened:
            return hashlib.sha256(opened.read(1 << 20) + str(self.file.stat().st_size).encode()).hexdigest()

    # ---------------------------------------------------------------- metadata
    @property
    def _architecture(self) -> str:
        return self._field("general.architecture")

    def _field(self, key: str, default=None):
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _config(self) -> dict:
        a = self._architecture
        if a not in ARCHITECTURES:
            raise ModelError(f"{self.path}: architecture {a!r} is not supported; supported are {', '.join(ARCHITECTURES)}")

        def need(key):
            value = self._field(f"{a}.{key}")
            if value is None:
                raise ModelError(f"{self.path}: the metadata has no {a}.{key}")
            return value
        N, D = need("attention.head_count"), need("embedding_length")
        vocabulary = self.shape("model.embed_tokens.weight")[0] if "model.embed_tokens.weight" in self._tensors else None
        if vocabulary is None:
            raise ModelError(f"{self.path}: tensor 'token_embd.weight' is missing")
        config = {
            "model_type": a, "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                                                "qwen3": "Qwen3ForCausalLM"}[a]],
            "vocab_size": vocabulary, "hidden_size": D, "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"), "num_attention_heads": N,
            "num_key_value_heads": self._field(f"{a}.attention.head_count_kv", N),
            "head_dim": self._field(f"{a}.attention.key_length", D // N),
            "max_position_embeddings": need("context_length"),
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field(f"{a}.rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(a), "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "hidden_act": "silu", "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"), "torch_dtype": "float16",
        }
        if a == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        return config

    def _rope_scaling(self, a: str) -> dict | None:
        kind, factor = self._field(f"{a}.rope.scaling.type"), self._field(f"{a}.rope.scaling.factor")
        if any(t.name == "rope_freqs.weight" for t in self._reader.tensors):
            raise ModelError(f"{self.path}: it carries llama3 RoPE factors (rope_freqs.weight) without the parameters that "
                             "made them: use the HuggingFace folder of this model")
        if kind in (None, "none"):
            return None
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._field(f"{a}.rope.scaling.original_context_length")
        return scaling

    def tokenizer(self):
        """A transformers fast tokenizer from the metadata."""
        prefix = "tokenizer.ggml."
        fields = {key.removeprefix(prefix): self._field(key) for key in self._reader.fields if key.startswith(prefix)}
        if "tokens" not in fields:
            raise ModelError(f"{self.path}: the metadata holds no tokenizer")
        return gguf_tokenizer.build(self.path, fields, self._field("tokenizer.chat_template"))


@functools.cache
def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        return f"model.layers.{match[1]}.{LAYER.get(match[2], match[2])}.{kind}"
    return f"{WHOLE.get(stem, stem)}.{kind}"


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Back from llama.cpp's interleaved pairs to HF's two halves, along the output axis."""
    return array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
