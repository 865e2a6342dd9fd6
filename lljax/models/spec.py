"""What a decoder is, read from its HuggingFace `config.json`. Families differ by a row in a table.

Letters: D model width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary, L layers.
"""

import dataclasses

from lljax.errors import ModelError
from lljax.models import rope
from lljax.models.rope import RopeSpec


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers of one decoder."""

    window: int | None = None                # tokens that a query sees, itself included; None for full attention
    rope: int | None = 0                     # which of `DecoderSpec.ropes` turns it; None for no RoPE


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder. Hashable, so that it can be a static part of a compiled program."""

    family: str                              # HF `model_type`
    V: int
    D: int
    N: int
    K: int
    H: int
    F: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec                           # the one that is stretched to read longer rows
    max_length: int                          # tokens that the model reads
    norm_eps: float
    tied: bool                               # the head is the embedding
    more_ropes: tuple[RopeSpec, ...] = ()    # of layers that have another one, see `ropes`
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def L(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Those that `LayerSpec.rope` counts."""
        return (self.rope, *self.more_ropes)


def _flag(name: str):
    return lambda c: c.get(name, False)


def _windows(*windows: int | None) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window) for window in windows)


def _upper_layers(c: dict) -> tuple[LayerSpec, ...]:
    """Qwen: a sliding window from layer `max_window_layers` on, or as `layer_types` says, where it is switched on."""
    L, window = c["num_hidden_layers"], c.get("sliding_window", 4096)
    if not c.get("use_sliding_window", False):
        return _windows(*(None,) * L)
    types = c.get("layer_types") or ["full_attention" if i < c.get("max_window_layers", 28) else "sliding_attention"
                                     for i in range(L)]
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: layer_types[{i}] {kind!r} is none of full_attention, sliding_attention")
    if len(types) != L:
        raise ModelError(f"config.json: layer_types has {len(types)} entries for num_hidden_layers={L}")
    return _windows(*(window if kind == "sliding_attention" else None for kind in types))


# What differs between families, as defaults of the fields above: values, or functions of the HF config.
FAMILIES = {
    "llama": {"qkv_bias": _flag("attention_bias"), "output_bias": _flag("attention_bias"),
              "mlp_bias": _flag("mlp_bias")},
    "mistral": {"layers": lambda c: _windows(*(c.get("sliding_window", 4096),) * c["num_hidden_layers"])},
    "qwen2": {"qkv_bias": True, "layers": _upper_layers},
    "qwen3": {"qkv_bias": _flag("attention_bias"), "output_bias": _flag("attention_bias"), "qk_norm": True,
              "layers": _upper_layers},
}
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}      # where config.json has none; llama: as many as query heads
HEAD_SIZE = {"qwen3": 128}                               # the others: hidden_size // num_attention_heads
MAX_LENGTH = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}


def from_hf(hf_config: dict) -> DecoderSpec:
    """Reads a HF `config.json`; absent fields take the defaults of transformers' config class of that family.

    Raises:
      ModelError: an unsupported family or activation, a missing field, or head counts that do not divide.
    """
    c, family = hf_config, hf_config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"config.json: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    c = {"max_position_embeddings": MAX_LENGTH[family], **c}
    optional = [field for field in ("num_key_value_heads", "head_dim") if c.get(field) is not None]
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "max_position_embeddings", *optional):
        if not isinstance(c.get(field), int) or c[field] < 1:
            raise ModelError(f"config.json: {field} is {c.get(field)!r}; a number of at least 1 is needed")
    if c.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {c['hidden_act']!r} is not supported; silu is")
    D, N, L = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    K = c.get("num_key_value_heads", KV_HEADS.get(family)) or N
    H = c.get("head_dim") or HEAD_SIZE.get(family, D // N)
    fields = {"layers": (LayerSpec(),) * L} | FAMILIES[family]
    fields = {name: value(c) if callable(value) else value for name, value in fields.items()}
    if N % K:
        raise ModelError(f"config.json: num_attention_heads={N} is no multiple of num_key_value_heads={K}")
    if H % 2:
        raise ModelError(f"config.json: head_dim={H} is odd, and RoPE turns pairs")
    rope_spec = rope.from_hf(c)
    for name in ("short_factor", "long_factor") if rope_spec.type == "longrope" else ():
        if (given := len(getattr(rope_spec, name))) != H // 2:
            raise ModelError(f"config.json: {name} has {given} entries; head_dim={H} needs {H // 2}")
    return DecoderSpec(family, V=c["vocab_size"], D=D, N=N, K=K, H=H, F=c["intermediate_size"], rope=rope_spec,
                       max_length=rope.reach(rope_spec, c["max_position_embeddings"]),
                       norm_eps=c.get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False), **fields)
