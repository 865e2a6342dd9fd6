"""A GGUF file as a base: dequantized tensor by tensor, its metadata read into HF form.

Key names: the `gguf` package's constants. A family says the rest in its row (`GgufFormat`).
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from lljax.errors import ModelError
from lljax.interop import gguf_tokenizer
from lljax.interop.base import Base
from lljax.interop.folder import crc32
from lljax.interop.gguf_layout import Layout, hf_name
from lljax.interop.gguf_rope import TENSORS, USE_FOLDER, read_rope
from lljax.models import rope
from lljax.models.families import FAMILIES
from lljax.models.families.family import Family, GgufFormat
from lljax.models.quantize import Form, Quantized
from lljax.models.values import NUMBER, Value, check, list_of, whole

COUNT = whole(1)
COUNTS = Value(
    lambda x: COUNT.holds(x) or list_of(COUNT).holds(x), f"{COUNT.wanted}, or a list of these"
)
MOST_VALUES = 1 << 22  # in an array of the metadata; the largest vocabularies have 2 ** 18


class Reader(gguf.GGUFReader):
    """The package's reader with bounds.

    The package reads bytes beyond the end of the file as nothing, reads an array of any length that
    a damaged file names, and accepts tensors that overlap.

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


class Part(NamedTuple):
    """A tensor of a file, or one of the experts in it."""

    tensor: gguf.ReaderTensor
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(int(x) for x in reversed(self.tensor.shape))
        return shape if self.expert is None else shape[1:]

    @property
    def data(self) -> np.ndarray:
        return self.tensor.data if self.expert is None else self.tensor.data[self.expert]


class GgufBase(Base):
    """A base in one GGUF file."""

    def __init__(self, path: str, file: Path):
        self.path, self.whole, self.folder, self._file = path, None, None, file
        with self._reading("not a GGUF file that can be read"):
            self._reader = Reader(file)
            self._family = self._family_of(self._field("general.architecture"))
            self._tensors = self._named()
            self.config = self._config()
            N, K = (self.config[f"num_{heads}_heads"] for heads in ("attention", "key_value"))
            self._layout = Layout(self._format, N, K)
            ends = [
                self._field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
            ]
            self._ends = [end for end in dict.fromkeys(ends) if end is not None]

    @contextlib.contextmanager
    def _reading(self, failure: str) -> Iterator[None]:
        """Turns any error of the packages on a damaged file into a ModelError of one line."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ModelError(f"{self.path}: {failure} ({type(error).__name__}: {reason})") from None

    @property
    def location(self) -> Path:
        return self._file

    @property
    def generation_config(self) -> dict[str, Any]:
        return {"eos_token_id": self._ends}

    def _named(self) -> dict[str, list[Part]]:
        """The parts of every HF tensor, nearly always one.

        Raises:
          ModelError: a tensor has another number of experts than the metadata name.
        """
        named: dict[str, list[Part]] = {}
        for tensor in self._reader.tensors:
            if tensor.name in TENSORS:
                continue
            name, E = hf_name(tensor.name, self._format), int(tensor.shape[-1])
            if "*" not in name:
                named.setdefault(name, []).append(Part(tensor))
                continue
            if (wanted := self._metadata("expert_count")) != E:
                raise ModelError(
                    f"{self.path}: tensor {tensor.name!r} has {E} experts, and the metadata make "
                    f"it {wanted}"
                )
            named |= {name.replace("*", str(e)): [Part(tensor, e)] for e in range(E)}
        order = {name: i for i, name in enumerate(self._format.names)}
        for parts in named.values():
            parts.sort(key=lambda part: order.get(part.tensor.name.split(".")[-2], 0))
        return named

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [part.shape for part in self._tensors[name]]
        if split := self._layout.splits(name):
            return split.join([np.broadcast_to(np.float32(0), shape) for shape in shapes]).shape
        return self._layout.hf_shape(name, shapes[0])

    def dtype(self, name: str) -> np.dtype:
        """The dtype that an export writes, the same for all tensors."""
        return np.dtype(getattr(ml_dtypes, self.config["torch_dtype"], self.config["torch_dtype"]))

    def read(self, name: str) -> np.ndarray:
        parts = self._tensors[name]
        kinds = ", ".join(part.tensor.tensor_type.name for part in parts)
        with self._reading(f"tensor {name!r} of type {kinds} cannot be dequantized"):
            arrays = [
                gguf.quants.dequantize(part.data, part.tensor.tensor_type).reshape(part.shape)
                for part in parts
            ]
            split = self._layout.splits(name)
            return split.join(arrays) if split else self._layout.to_hf(name, arrays[0])

    def stored(self, name: str, form: Form) -> Quantized | None:
        return None  # no format of GGUF blocks is one of ours

    def checksum(self, name: str, before: int = 0) -> int:
        return functools.reduce(
            lambda sum, part: crc32(part.data, sum), self._tensors[name], before
        )

    def fingerprint(self) -> str:
        """sha256 over the size, the metadata and the table of tensors; the weights are not read."""
        with open(self._file, "rb") as opened:
            head = opened.read(self._reader.data_offset)
        return hashlib.sha256(head + str(self._file.stat().st_size).encode()).hexdigest()

    # ---------------------------------------------------------------- metadata
    def _family_of(self, architecture: Any) -> Family:
        families = {
            (row.gguf.architecture, experts): row
            for row in FAMILIES.values()
            if row.gguf and row.gguf.read
            for experts in (True, False)
            if row.gguf.experts in (experts, None)
        }
        experts = bool(self._field(f"{architecture}.expert_count"))
        if (architecture, experts) not in families:
            supported = sorted({name for name, _ in families})
            raise ModelError(
                f"{self.path}: architecture {architecture!r} {'with experts ' * experts}is not "
                f"supported; supported are {', '.join(supported)}"
            )
        return families[architecture, experts]

    @property
    def _format(self) -> GgufFormat:
        format = self._family.gguf
        assert format is not None  # see _family_of
        return format

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _metadata(self, key: str, default: Any = None, wanted: Value = COUNT) -> Any:
        """The value of a key below the architecture.

        Raises:
          ModelError: it is absent and has no default, or is not as wanted, such as a list for
            layers that differ.
        """
        key = f"{self._format.architecture}.{key}"
        value = self._field(key, default)
        if value is None:
            raise ModelError(f"{self.path}: the metadata has no {key}")
        check({key: value}, {key: wanted}, str(self.path))
        return value

    def _config(self) -> dict[str, Any]:
        embedding = "model.embed_tokens.weight"
        if embedding not in self._tensors:
            raise ModelError(f"{self.path}: tensor 'token_embd.weight' is missing")
        N, D = self._metadata("attention.head_count"), self._metadata("embedding_length")
        config = {
            "model_type": self._family.model_type,
            "architectures": [self._family.architecture],
            "vocab_size": self._tensors[embedding][0].shape[0],
            "hidden_size": D,
            "intermediate_size": self._metadata("feed_forward_length"),
            "num_hidden_layers": self._metadata("block_count")
            - self._metadata("nextn_predict_layers", 0, whole(0)),
            "num_attention_heads": N,
            "num_key_value_heads": self._metadata(
                "attention.head_count_kv", N, COUNTS if self._format.kv_heads_by_layer else COUNT
            ),
            "head_dim": self._metadata("attention.key_length", D // N),
            "max_position_embeddings": self._metadata("context_length"),
            "rms_norm_eps": self._metadata("attention.layer_norm_rms_epsilon", wanted=NUMBER),
            "rope_theta": self._metadata("rope.freq_base", 10_000.0, rope.THETA),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "hidden_act": "silu",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "torch_dtype": self._dtype_name(),
        }
        H = config["head_dim"]
        rotary = self._metadata("rope.dimension_count", H)
        if self._format.partial:
            config["partial_rotary_factor"] = rotary / H
        elif rotary != H:
            raise ModelError(
                f"{self.path}: {self._format.architecture}.rope.dimension_count is {rotary} of {H} "
                f"dimensions, which is not supported: {USE_FOLDER}"
            )
        scaling = self._rope_scaling(config["rope_theta"], H)
        config["rope_scaling"] = scaling
        kind = rope.KINDS.get(scaling["rope_type"]) if scaling else None
        if kind and kind.vllm_multiplies:
            # config.json names the length before it is stretched; converted files name no other.
            original = self._metadata("rope.scaling.original_context_length", 0, whole(0))
            config["max_position_embeddings"] = original or config["max_position_embeddings"]
        config |= self._format.config(config, self._metadata, set(self._tensors))
        if config["rope_scaling"] is None:  # transformers takes null in place of rope_parameters
            del config["rope_scaling"]
        return config

    def _dtype_name(self) -> str:
        """float16, unless a value may overflow it."""
        bfloat16 = any(
            tensor.tensor_type == gguf.GGMLQuantizationType.BF16 for tensor in self._reader.tensors
        )
        return self._format.dtype or ("bfloat16" if bfloat16 else "float16")

    def _rope_scaling(self, theta: float, H: int) -> dict[str, Any] | None:
        prefix = f"{self._format.architecture}.rope.scaling"
        tensors = {
            tensor.name: np.asarray(tensor.data, np.float32).reshape(-1)
            for tensor in self._reader.tensors
            if tensor.name in TENSORS
        }
        return read_rope(
            lambda key: self._field(f"{prefix}.{key}"),
            tensors,
            theta=theta,
            H=H,
            where=f"{self.path}: {prefix}",
            kinds=self._format.rope_kinds,
            log_multiplier=self._format.yarn_log_multiplier,
        )

    def tokenizer(self) -> Any:
        """A fast tokenizer of transformers, from the metadata."""
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
