"""The row of a family, and helpers to read its config.json.

A function of a row gets `c`, the config.json of a model as a dict, with the defaults of the family
in place of absent fields and its values checked.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from lljax.errors import ModelError, short
from lljax.models.rope import EXTENDABLE
from lljax.models.spec import DecoderSpec, LayerSpec, Norms
from lljax.models.values import Value, check, optional, whole

# Norms of what attention and MLP return, and of nothing that they read.
NORMS_AFTER = Norms(
    before_mixer=None,
    after_mixer="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
GGUF_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Metadata(Protocol):
    """Reads a key of a GGUF file below the name of its architecture."""

    def __call__(self, key: str, default: Any = None, wanted: Value = ...) -> Any:
        """The value of the key.

        Raises:
          ModelError: the key is absent and has no default, or its value is not as wanted.
        """
        ...


def _no_entries(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {}


def _no_metadata(spec: DecoderSpec) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class SplitTensor:
    """A HF tensor that files have in parts, with GGUF names of their own.

    split(array, spec): its parts, in the order of their names in `GgufFormat.names`. join(parts):
      the inverse.
    """

    split: Callable[[np.ndarray, DecoderSpec], tuple[np.ndarray, ...]]
    join: Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GgufFormat:
    """A family in GGUF files, as llama.cpp's convert_hf_to_gguf.py writes them and llama.cpp reads
    them.

    read: files of the architecture, with experts or without, are read as this family. Of families
      that share them, one is read and the others are only written.
    experts: layers have experts; None if some models of the family have them.
    names: HF names of a layer by their GGUF names, where they differ from
      lljax.interop.gguf_layout.LAYER.
    splits: tensors in parts by their HF names, to which several of `names` lead.
    one_row: ends of HF names of tensors that HF keeps as [1, n], and a file as [n].
    permuted: the rows of q and k are in interleaved pairs.
    norms_plus_one: weights of norms are stored as 1 + weight.
    dtype: the dtype of an export; None for float16, or bfloat16 if the file holds a tensor of that
      type.
    yarn_log_multiplier: the value of this key for an mscale_all_dim of 1; 0 if llama.cpp does not
      read it in models of this architecture.
    kv_heads_by_layer: attention.head_count_kv may be a list, with a number for each layer.
    partial: RoPE may rotate a part of a head, its first dimensions.
    config(config, metadata, names): more entries of config.json, from the entries that all families
      have, the metadata and the HF names of the tensors.
    metadata(spec): the inverse, more metadata by key below the architecture.
    rope_kinds: the kinds of RoPE that llama.cpp applies in models of this architecture. Divisors of
      frequencies (rope_freqs) are of the kind llama3, or of proportional if that is among them.
    """

    architecture: str
    read: bool = True
    experts: bool | None = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, SplitTensor] = dataclasses.field(default_factory=dict)
    one_row: tuple[str, ...] = ()
    permuted: bool = False
    norms_plus_one: bool = False
    dtype: str | None = None
    yarn_log_multiplier: float = 0.0
    kv_heads_by_layer: bool = False
    partial: bool = False
    config: Callable[[dict, Metadata, set[str]], dict[str, Any]] = _no_entries
    metadata: Callable[[DecoderSpec], dict[str, Any]] = _no_metadata
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")


class Names(NamedTuple):
    """What names of a text model begin with in a multimodal model, in place of "model" and of
    "lm_head".
    """

    model: str
    head: str

    def of(self, name: str) -> str:
        """The name in the multimodal model of a tensor or module of the text model."""
        first, dot, rest = name.partition(".")
        return {"model": self.model, "lm_head": self.head}[first] + dot + rest

    def text(self, name: str) -> str | None:
        """The inverse of `of`; None for a name that is not of the text model."""
        for outer, inner in ((self.model, "model"), (self.head, "lm_head")):
            if name == outer or name.startswith(f"{outer}."):
                return inner + name.removeprefix(outer)
        return None


INSIDE = Names("model.language_model", "lm_head")
WRAPPED = Names("language_model.model", "language_model.lm_head")
BESIDE = Names("model", "lm_head")


@dataclasses.dataclass(frozen=True)
class MultimodalModel:
    """A multimodal model whose text model is of a family.

    names: how checkpoints name the text model's tensors. The first are the names of the modules in
      the class of transformers, which adapters have. A checkpoint has the first of `names` that any
      of its tensors has.
    tied: the head is the embedding if the config.json of the whole model does not say.
    flat: config.json may hold the fields of text_config itself.
    defaults: fields of text_config, as the config class of transformers sets them if they are
      absent, where they differ from the defaults of the family.
    fused_experts: checkpoints keep the experts of a layer in two tensors, gate_up_proj and
      down_proj (lljax.interop.fused_experts).
    text_adapters: adapters are for the text model, since the class of transformers fails on text.
    """

    model_type: str
    names: tuple[Names, ...]
    tied: bool = False
    flat: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused_experts: bool = False
    text_adapters: bool = False


def _one_rope(c: dict) -> tuple[dict, ...]:
    return (c,)


def _unchanged(spec: DecoderSpec, entries: dict) -> dict:
    return entries


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that is particular to a family.

    model_type: its name in config.json.
    architecture: the class of transformers that an export names. loader: the class that loads it.
    defaults: fields of config.json, as the config class of transformers sets them if they are
      absent; CONFIG_DEFAULTS holds for all families.
    decoder(c): the fields of DecoderSpec that differ from their defaults. Sizes, RoPE, norm_eps and
      tied are read for all families alike (lljax.models.families.from_config); without `layers`,
      every layer has full attention and an MLP.
    checks: the values that fields of config.json may hold, besides CONFIG_CHECKS.
    ropes(c): the config.json that each RoPE of the decoder is read from, the one to stretch first.
    rope_to_hf(spec, entries): the config.json entries of the RoPE, from the usual ones
      (lljax.models.rope.to_hf). rope_fields: their names, besides the usual ones.
    rope_kinds: the kinds of RoPE that transformers loads a stretched model with.
    peft_experts: PEFT loads adapters of single experts.
    gguf: its GGUF files; None if they are not read.
    multimodal_parents: the multimodal models whose text model it is.
    aliases: other names of `model_type`, and the defaults that differ under them. Such a
      config.json is read and exported as one of `model_type`.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    decoder: Callable[[dict], dict[str, Any]]
    checks: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    ropes: Callable[[dict], tuple[dict, ...]] = _one_rope
    rope_to_hf: Callable[[DecoderSpec, dict], dict] = _unchanged
    rope_fields: tuple[str, ...] = ()
    rope_kinds: tuple[str, ...] = EXTENDABLE
    loader: str = "AutoModelForCausalLM"
    peft_experts: bool = False
    gguf: GgufFormat | None = None
    multimodal_parents: tuple[MultimodalModel, ...] = ()
    aliases: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def first_set(c: dict, *names: str) -> int:
    """The first of these fields that is set.

    Raises:
      ModelError: none is set, or it is no whole number of at least 1.
    """
    name = next((name for name in names if c.get(name) is not None), names[0])
    check({name: c.get(name)}, {name: whole(1)})
    return c[name]


def sliding_window(c: dict) -> int | None:
    """The window of the layers that slide; None if it is off."""
    check(c, {"sliding_window": optional(whole(1))})
    return c.get("sliding_window")


def uniform_layers(c: dict, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """The same layer as often as the model has layers."""
    return (layer,) * c["num_hidden_layers"]


def per_layer(c: dict, name: str, default: Callable[[int], Any]) -> list:
    """The entries of a field that has one for every layer; default(layer) if it is absent.

    Raises:
      ModelError: the field has another number of entries.
    """
    L = c["num_hidden_layers"]
    entries = c.get(name) or [default(i) for i in range(L)]
    if not isinstance(entries, list) or len(entries) != L:
        number = len(entries) if isinstance(entries, list) else short(entries)
        raise ModelError(f"config.json: {name} has {number} entries for num_hidden_layers={L}")
    return entries


def local_layers(
    c: dict, default: Callable[[int], Any], local: str = "sliding_attention"
) -> list[bool]:
    """Whether every layer is `local`, from `layer_types`; default(layer) if that is absent."""
    return layers_of_kind(c, "layer_types", local, "full_attention", default)


def layers_of_kind(
    c: dict, name: str, kind: str, other: str, default: Callable[[int], Any]
) -> list[bool]:
    """Whether every layer is of `kind`, from a field that has `kind` or `other` for each of them;
    default(layer) if it is absent.

    Raises:
      ModelError: a layer is of neither kind.
    """
    kinds = per_layer(c, name, lambda i: kind if default(i) else other)
    for i, given in enumerate(kinds):
        if given not in (other, kind):
            raise ModelError(f"config.json: {name}[{i}] {short(given)} is none of {other}, {kind}")
    return [given == kind for given in kinds]


def rotated_layers(c: dict) -> list[bool]:
    """Whether every layer has RoPE: those with 1 in `no_rope_layers`, in spite of the name; or all
    except every `no_rope_layer_interval`-th.
    """
    interval = first_set(c, "no_rope_layer_interval")
    return [bool(x) for x in per_layer(c, "no_rope_layers", lambda i: (i + 1) % interval)]
