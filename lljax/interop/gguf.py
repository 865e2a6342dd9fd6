"""A GGUF file as a base: dequantised tensor by tensor, its metadata read into HF form.

Key names: the `gguf` package's constants. Tensor names and the q/k permutation: llama.cpp's
  convert_hf_to_gguf.py.
"""

import contextlib
import hashlib
import itertools
import re
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from lljax.errors import ModelError, short
from lljax.interop import gguf_tokenizer
from lljax.interop.folder import crc32
from lljax.models.rope import FIELDS, THETA, RopeSpec, base_frequencies, llama3_frequencies
from lljax.models.values import NUMBER, check, whole

# HF's model_type and class of each. Mistral models call themselves llama.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
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
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

YARN = {
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
# What else llama.cpp scales by, with the values that change nothing.
NEUTRAL = {
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
    "alpha": 0.0,
}

COUNT = whole(1)
MOST_VALUES = 1 << 22  # in an array of the metadata: of a larger vocabulary nobody has heard


class Reader(gguf.GGUFReader):
    """The package's own, but within bounds: it takes what lies beyond the end of the file for
    nothing, goes through an array of any length that a damaged file names, and lets tensors
    overlap.

    Raises:
      ValueError: beyond a bound.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        spans = sorted(
            (tensor.data_offset, tensor.data_offset + tensor.n_bytes, tensor.name)
            for tensor in self.tensors
        )
        for (_, stop, name), (start, _, other) in itertools.pairwise(spans):
            if start < stop:
                raise ValueError(f"tensors {name!r} and {other!r} overlap")

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it is cut short, or names a length beyond its end")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        if (
            raw_type == gguf.GGUFValueType.ARRAY
            and (n := int(self._get(orig_offs + 4, np.uint64)[0])) > MOST_VALUES
        ):
            raise ValueError(f"an array of {n} values in its metadata")
        return super()._get_field_parts(orig_offs, raw_type)


class GgufBase:
    """The interface of lljax.interop.folder.FolderBase over one GGUF file."""

    def __init__(self, path: str, file: Path):
        self.path, self.prefix, self.file, self.folder, self.generation_config = (
            path,
            "",
            file,
            None,
            None,
        )
        with self._reading("not a GGUF file that can be read"):
            self._reader = Reader(file)
            names = LAYER | (GEMMA if self._architecture == "gemma3" else {})
            self._tensors = {
                _hf_name(t.name, names): t
                for t in self._reader.tensors
                if t.name != "rope_freqs.weight"
            }
            self.config = self._config()
            ends = [
                self._field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
            ]
            self.generation_config = {
                "eos_token_id": [end for end in dict.fromkeys(ends) if end is not None]
            }

    @contextlib.contextmanager
    def _reading(self, failure: str):
        """Whatever damage raises in there is one line: the packages raise what it happens to lead
        to.
        """
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ModelError(f"{self.path}: {failure} ({type(error).__name__}: {reason})") from None

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(x) for x in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        """What an export writes, for all tensors alike."""
        return np.dtype(getattr(ml_dtypes, self.config["torch_dtype"], self.config["torch_dtype"]))

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        with self._reading(
            f"tensor {name!r} of type {tensor.tensor_type.name} cannot be dequantised"
        ):
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
                self.shape(name)
            )
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
                name.split(".")[-2]
            )
            if heads and self._architecture == "llama":
                array = _unpermute(array, self.config[heads])
            if self._architecture == "gemma3" and name.endswith("norm.weight"):
                array = array - 1  # llama.cpp stores what the norm multiplies by
            return array

    def stored(self, name: str, form):
        return None  # of its blocks none is one of ours

    def checksum(self, name: str, before: int = 0) -> int:
        return crc32(self._tensors[name].data, before)

    def fingerprint(self) -> str:
        """sha256 over the size, the metadata and the table of tensors; the weights are not read."""
        with open(self.file, "rb") as opened:
            head = opened.read(self._reader.data_offset)
        return hashlib.sha256(head + str(self.file.stat().st_size).encode()).hexdigest()

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
            raise ModelError(
                f"{self.path}: architecture {a!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )

        def need(key, default=None, wanted=COUNT):
            value = self._field(f"{a}.{key}", default)
            if value is None:
                raise ModelError(f"{self.path}: the metadata has no {a}.{key}")
            # a list: layers that differ
            check({f"{a}.{key}": value}, {f"{a}.{key}": wanted}, str(self.path))
            return value

        # Activations of Gemma overflow float16, and a weight in bfloat16 may.
        wide = a == "gemma3" or any(
            t.tensor_type == gguf.GGMLQuantizationType.BF16 for t in self._reader.tensors
        )
        N, D = need("attention.head_count"), need("embedding_length")
        vocabulary = (
            self.shape("model.embed_tokens.weight")[0]
            if "model.embed_tokens.weight" in self._tensors
            else None
        )
        if vocabulary is None:
            raise ModelError(f"{self.path}: tensor 'token_embd.weight' is missing")
        config = {
            "model_type": ARCHITECTURES[a][0],
            "architectures": [ARCHITECTURES[a][1]],
            "vocab_size": vocabulary,
            "hidden_size": D,
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": N,
            "num_key_value_heads": need("attention.head_count_kv", N),
            "head_dim": need("attention.key_length", D // N),
            "max_position_embeddings": need("context_length"),
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon", wanted=NUMBER),
            "rope_theta": need("rope.freq_base", 10_000.0, THETA),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "hidden_act": "silu",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "bfloat16" if wide else "float16",
        }
        if a == "gemma3":  # only the largest scales scores by another number than its head size
            scored = D // N if config["num_hidden_layers"] == 62 else config["head_dim"]
            config |= {
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "rope_theta": need("rope.freq_base", 1_000_000.0, THETA),
                "query_pre_attn_scalar": scored,
                "sliding_window": need("attention.sliding_window"),
                "rope_local_base_freq": need("rope.freq_base_swa", 10_000.0, THETA),
            }
        if (turning := need("rope.dimension_count", config["head_dim"])) != config["head_dim"]:
            raise ModelError(
                f"{self.path}: {a}.rope.dimension_count is {turning} of {config['head_dim']} dimensions, which is "
                "not supported: use the HuggingFace folder of this model"
            )
        if a == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        return config | {
            "rope_scaling": self._rope_scaling(a, config["rope_theta"], config["head_dim"])
        }

    def _rope_scaling(self, a: str, theta: float, H: int) -> dict | None:
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                return self._llama3(np.asarray(tensor.data, np.float32).reshape(-1), theta, H)
        kind, factor = (
            self._field(f"{a}.rope.scaling.type"),
            self._field(f"{a}.rope.scaling.factor"),
        )
        if kind in (None, "none"):
            return None
        for key, neutral in NEUTRAL.items():
            if (value := self._field(f"{a}.rope.scaling.{key}", neutral)) != neutral:
                raise ModelError(
                    f"{self.path}: {a}.rope.scaling.{key} is {short(value)}, which is not supported: use the "
                    "HuggingFace folder of this model"
                )
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling |= {name: self._field(f"{a}.rope.scaling.{key}") for name, key in YARN.items()}
        check(scaling, FIELDS, f"{self.path}: {a}.rope.scaling")
        return scaling

    def _llama3(self, divisors: np.ndarray, theta: float, H: int) -> dict:
        """The parameters that give these divisors of the frequencies [H / 2]. The file does not
        keep them: those of every released Llama 3 but the factor, which is the largest divisor;
        checked.
        """
        spec = RopeSpec("llama3", theta=theta, factor=float(divisors.max()), original_length=8192)
        made = base_frequencies(theta, H) / np.asarray(llama3_frequencies(spec, H, 0).inverse)
        if made.shape != divisors.shape or not np.allclose(made, divisors, rtol=1e-4):
            raise ModelError(
                f"{self.path}: it carries RoPE factors (rope_freqs.weight) that are not those of a Llama "
                "3: use the HuggingFace folder of this model"
            )
        return {
            "rope_type": "llama3",
            "factor": spec.factor,
            "low_freq_factor": spec.low_freq_factor,
            "high_freq_factor": spec.high_freq_factor,
            "original_max_position_embeddings": spec.original_length,
        }

    def tokenizer(self):
        """A transformers fast tokenizer from the metadata."""
        prefix = "tokenizer.ggml."
        with self._reading("the tokenizer in the metadata is damaged"):
            fields = {
                key.removeprefix(prefix): self._field(key)
                for key in self._reader.fields
                if key.startswith(prefix)
            }
            if "tokens" not in fields:
                raise ModelError(f"{self.path}: the metadata holds no tokenizer")
            return gguf_tokenizer.build(self.path, fields, self._field("tokenizer.chat_template"))


def _hf_name(name: str, layer: dict) -> str:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        return f"model.layers.{match[1]}.{layer.get(match[2], match[2])}.{kind}"
    return f"{WHOLE.get(stem, stem)}.{kind}"


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Back from llama.cpp's interleaved pairs to HF's two halves, along the output axis."""
    return (
        array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )
