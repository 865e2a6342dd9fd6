import dataclasses
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lljax.config.shipped import shipped_model
from lljax.errors import ConfigError, ModelError
from lljax.interop import gguf_tokenizer, gguf_write
from lljax.interop.base import Base
from lljax.interop.gguf_layout import Layout, gguf_places
from lljax.interop.gguf_lora import write_lora_gguf
from lljax.interop.gguf_tokenizer import RULES
from lljax.interop.gguf_tokenizer_write import pre_tokenizer_name
from lljax.interop.gguf_write import TYPES, write_gguf
from lljax.interop.huggingface import hf_shape, load_weights, parts_of
from lljax.interop.open import end_tokens, open_base
from lljax.models import lora, rope
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.rope import frequencies

TINY = open_base(str(Path(shipped_model("lljax/assets/tiny-512")).resolve()))
TOKENIZER = TINY.tokenizer()
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 32}
MSCALES = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SIGMOID = EXPERTS | {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": GEMMA | {"tie_word_embeddings": True},
    "iquestcoder": {"attention_bias": True},
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 5},
    "ernie4_5": {},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.09,
        "logits_scaling": 8.0,
    },
    "glm4": {"head_dim": 32},
    "exaone4": {"sliding_window": None},
    "olmo2": {},
    "hunyuan_v1_dense": {"head_dim": 32},
    "gemma2": GEMMA | {"tie_word_embeddings": True, "attn_logit_softcapping": 5.0},
    "phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    },
    "ministral3": {"rope_parameters": MSCALES | {"llama_4_scaling_beta": 0.5}},
}
CONFIGS |= {
    "qwen3_moe": EXPERTS | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 32},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 48},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
    },
    "dots1": SIGMOID
    | {"first_k_dense_replace": 1, "sliding_window": None, "num_key_value_heads": 4},
    "glm4_moe": SIGMOID | {"first_k_dense_replace": 1, "head_dim": 32, "use_qk_norm": True},
    "solar_open": SIGMOID,
    "deepseek_v3": SIGMOID
    | {
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "rope_parameters": MSCALES,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 8},
}
CONFIGS["gemma4_text"] = {
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}
# Sizes at which llama.cpp computes something else.
SIZES = {
    "26B": EXPERTS | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3},
    "32B": {"num_hidden_layers": 64, "sliding_window": 8, "sliding_window_pattern": 4},
}
SHARED = {  # families whose files are read as another's
    "mistral": "llama",
    "iquestcoder": "llama",
    "solar_open": "glm4_moe",
}
TEXTS = ["hello  world\n\n\tdef f(x):", "I'LL don't 12345", "\u65e5\u672c \U0001f642 e\u0301 "]


class RandomBase(Base):
    """Random weights under a config.json, and a tokenizer."""

    def __init__(self, family="llama", tokenizer=TOKENIZER, **changes):
        self.path, self.folder, self.whole = "models/random", TINY.folder, None
        self.config = SHAPE | {"model_type": family} | CONFIGS.get(family, {}) | changes
        self.spec, self._tokenizer = spec_from_hf(self.config), tokenizer
        parts = parts_of(Decoder(self.spec))
        rng = np.random.default_rng(0)
        self.arrays = {
            name: rng.normal(size=hf_shape(of[0][0])).astype(np.float32)
            for name, of in parts.items()
        }
        self.reads = []

    generation_config = None
    location = TINY.folder

    def names(self):
        return list(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name):
        self.reads.append(name)
        return self.arrays[name]

    def checksum(self, name, before=0):
        return before

    def tokenizer(self):
        return self._tokenizer


def written(base, path, type="f32", spec=None, **options):
    """The base in the file that was written from `base`."""
    write_gguf(base, spec or base.spec, path / "m.gguf", type=type, **options)
    return open_base(str(path / "m.gguf"))


def stretched(spec, kind, length=256, **changes):
    longer = rope.extend(
        spec.rope, type=kind, factor="auto", length=length, max_length=spec.max_length
    )
    return dataclasses.replace(spec, rope=dataclasses.replace(longer, **changes), max_length=length)


def field(path, key):
    found = gguf.GGUFReader(path / "m.gguf").get_field(key)
    return None if found is None else found.contents()


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.gguf])
@pytest.mark.parametrize("type", ["f32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_family_is_read_as_it_was_written(tmp_path, family, type):
    base = RandomBase(family)
    if type == "bf16":  # values that bfloat16 holds, but for norms that are stored as 1 + weight
        base.arrays = {
            name: np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)
            for name, array in base.arrays.items()
        }
    read = written(base, tmp_path, type)
    spec = spec_from_hf(read.config)
    assert spec.family == SHARED.get(family, family)
    for length in (20, base.spec.max_length):
        wanted, found = (frequencies(of.rope, of.rotary(), length) for of in (base.spec, spec))
        np.testing.assert_allclose(found.inverse, wanted.inverse, rtol=1e-6)
        assert found.scale == pytest.approx(wanted.scale, rel=1e-6)
    same = {"family": base.spec.family, "rope": base.spec.rope}  # test_a_stretched_rope_is_read
    same["attention_scale"] = base.spec.attention_scale
    for name in ("norm_eps", "logit_scale", "residual_scale", "scale"):  # float32 in the file
        assert getattr(spec, name) == pytest.approx(getattr(base.spec, name), rel=1e-6)
        same |= {name: getattr(base.spec, name)} if name != "scale" else {}
    assert dataclasses.replace(spec, **same) == base.spec
    assert set(read.names()) == set(base.names())
    for name, array in base.arrays.items():
        if FAMILIES[family].gguf.norms_plus_one and name.endswith("norm.weight"):
            np.testing.assert_allclose(read.read(name), array, atol=3e-7)
        else:
            np.testing.assert_array_equal(read.read(name), array)


def test_every_architecture_is_read_as_one_family():
    rows = [row.gguf for row in FAMILIES.values() if row.gguf]
    kinds = {False: (False,), True: (True,), None: (False, True)}  # of GgufFormat.experts
    read = [(row.architecture, e) for row in rows if row.read for e in kinds[row.experts]]
    assert len(read) == len(set(read))
    assert set(read) == {(row.architecture, e) for row in rows for e in kinds[row.experts]}


@pytest.mark.sample(3)
@pytest.mark.parametrize("type", TYPES)
def test_matrices_are_of_the_type_and_norms_and_biases_are_float32(tmp_path, type):
    base = RandomBase("qwen2")
    read = written(base, tmp_path, type)
    form = TYPES[type][0]
    assert field(tmp_path, "general.file_type") == TYPES[type][1]
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        matrix = tensor.name.endswith(".weight") and "norm" not in tensor.name
        assert tensor.tensor_type.name == (form.name if matrix else "F32")
    for name, array in base.arrays.items():
        wanted = array
        if array.ndim == 2:
            wanted = gguf.quants.dequantize(gguf.quants.quantize(array, form), form)
        np.testing.assert_array_equal(read.read(name), wanted)


def test_rows_that_32_does_not_divide_are_float16_and_counted(tmp_path, caplog):
    base = RandomBase("qwen2", intermediate_size=80)
    read = written(base, tmp_path, "q4_0")
    assert "2 tensors have rows that 32 does not divide" in caplog.text
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(read.read(name), base.arrays[name].astype(np.float16))


@pytest.mark.parametrize(
    "value,type,line",
    [
        (1e5, "f16", "'blk.1.attn_v.weight' has a value of 1e\\+05, too large for f16.*=bf16"),
        (-1e5, "q8_0", "too large for q8_0"),
        (math.nan, "f32", "'blk.1.attn_v.weight' holds values that are not finite"),
    ],
)
def test_values_that_a_type_does_not_hold_are_refused(tmp_path, value, type, line):
    base = RandomBase()
    base.arrays["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    with pytest.raises(ConfigError, match=line):
        written(base, tmp_path, type)
    if not math.isnan(value):
        assert written(base, tmp_path, "bf16")


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    class Counted(RandomBase):
        alive = None

        def read(self, name):
            assert self.alive is None or self.alive() is None
            array = super().read(name).copy()
            self.alive = weakref.ref(array)
            return array

    for type in ("f32", "q4_0"):
        for family in ("llama", "qwen3_moe"):
            written(Counted(family), tmp_path, type)


def test_routers_are_float32_and_experts_are_quantized_alone(tmp_path):
    base = RandomBase("qwen2_moe", intermediate_size=64, shared_expert_intermediate_size=64)
    read = written(base, tmp_path, "q4_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    assert types["blk.0.ffn_down_exps.weight"] == types["blk.0.ffn_down_shexp.weight"] == "Q4_0"
    form = gguf.GGMLQuantizationType.Q4_0
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        wanted = gguf.quants.dequantize(gguf.quants.quantize(base.arrays[name], form), form)
        np.testing.assert_array_equal(read.read(name), wanted)
    sums = {read.checksum(f"model.layers.1.mlp.experts.{e}.down_proj.weight") for e in range(8)}
    assert len(sums) == 8


def test_a_file_of_another_number_of_experts_than_it_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_write, "_experts", lambda spec: {"expert_count": 7})
    with pytest.raises(ConfigError, match="'blk.0.ffn_down_exps.weight' has 8 experts.* it 7"):
        written(RandomBase("qwen3_moe"), tmp_path)


def test_tensors_that_are_missing_or_of_another_shape_or_extra_are_said(tmp_path, caplog):
    base = RandomBase()
    base.arrays["model.layers.0.extra.weight"] = np.ones(3, np.float32)
    base.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    written(base, tmp_path)
    assert "1 tensors are not part of the model" in caplog.text
    norm = base.arrays.pop("model.norm.weight")
    with pytest.raises(ModelError, match="'model.norm.weight' is missing"):
        written(base, tmp_path)
    base.arrays["model.norm.weight"] = norm[:-1]
    with pytest.raises(ModelError, match="'model.norm.weight' has shape"):
        written(base, tmp_path)


# ---------------------------------------------------------------- metadata and RoPE
def test_the_metadata_names_the_stretched_context(tmp_path):
    base = RandomBase("qwen3")
    written(base, tmp_path, spec=stretched(base.spec, "yarn", beta_fast=16.0))
    wanted = {
        "context_length": 256,
        "attention.key_length": 32,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.attn_factor": None,
    }
    assert {key: field(tmp_path, f"qwen3.{key}") for key in wanted} == wanted
    assert field(tmp_path, "general.name") == "random"


FACTORS = {
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
BASES = {  # a base of its own kind, by the kind of RoPE
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": FACTORS,
    "yarn": {"factor": 2.0, "attention_factor": 1.3},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "family,kind,own",
    [
        *(("llama", kind, own) for kind in ("linear", "yarn") for own in (False, True)),
        ("llama", "llama3", True),
        ("llama", "longrope", True),
        ("qwen2", "yarn", True),
        ("mistral", "linear", False),
        ("gemma3_text", "linear", False),
        ("gemma3_text", "yarn", False),
    ],
)
def test_a_stretched_rope_is_read_as_it_was_written(tmp_path, family, kind, own):
    fields = {}
    if own and kind != "linear":
        fields["rope_scaling"] = BASES[kind] | {
            "rope_type": kind,
            "original_max_position_embeddings": 32,
        }
    elif own:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    base = RandomBase(family, **fields)
    spec = stretched(base.spec, kind)
    read = spec_from_hf(written(base, tmp_path, spec=spec).config)
    assert read.max_length == 256 and read.rope.type == kind
    for ours, theirs in zip(spec.ropes, read.ropes, strict=True):
        for length in (20, 256):
            wanted, found = (frequencies(of, spec.H, length) for of in (ours, theirs))
            np.testing.assert_allclose(found.inverse, wanted.inverse, rtol=1e-6)
            assert found.scale == pytest.approx(wanted.scale, rel=1e-6)


def test_the_attention_factor_is_relative_to_llama_cpps_own(tmp_path):
    """llama.cpp multiplies attn_factor with 1 + 0.1 log(factor)."""
    base = RandomBase()
    written(base, tmp_path, spec=stretched(base.spec, "yarn", attention_factor=1.5))
    own = 1 + 0.1 * math.log(4)
    assert field(tmp_path, "llama.rope.scaling.attn_factor") == pytest.approx(1.5 / own)


@pytest.mark.parametrize(
    "family,fields,change,line",
    [
        ("glm", {}, {}, "family glm are not"),
        ("gemma4_text", {"attention_bias": True}, {}, "qkv_bias False in place of True"),
        ("mixtral", {"sliding_window": 32}, {}, "layer 0 window None in place of 32"),
        ("qwen3_moe", {"norm_topk_prob": False}, {}, "moe normalize True in place of False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, {}, "layer 0 moe True in place of False"),
        ("qwen2_moe", {"norm_topk_prob": True}, {}, "normalize False in place of True"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, {}, "layer 2 moe True in place of False"),
        ("dots1", {"num_key_value_heads": 2}, {}, "K 4 in place of 2"),
        (
            "dots1",
            {"sliding_window": 8, "max_window_layers": 0},
            {},
            "layer 0 window None in place of",
        ),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, {}, "epsilon is .*it has to be 1e-06"),
        ("deepseek_v3", {"rope_interleave": False}, {}, "interleaved True in place of False"),
        ("deepseek_v3", {"q_lora_rank": None}, {}, "the metadata has no .*q_lora_rank"),
        ("deepseek_v3", {}, {"mscale_all_dim": 0.7}, "yarn_log_multiplier is 0.07.*to be 0.1"),
        ("deepseek_v3", {}, {"mscale": None, "mscale_all_dim": None}, "no .*yarn_log_multiplier"),
        ("minimax_m2", {"tie_word_embeddings": True}, {}, "tied False in place of True"),
        ("mistral", {"sliding_window": 32}, {}, "layer 0 window None in place of 32: .*=merged"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            {},
            "layer 1",
        ),
        ("qwen3", {"attention_bias": True}, {}, "qkv_bias False in place of True"),
        ("exaone4", {"sliding_window": 8}, {}, "layer 0 window None in place of"),
        ("olmo2", {"tie_word_embeddings": True}, {}, "tied False in place of True"),
        ("olmo2", {"head_dim": 32}, {}, "H 16 in place of 32"),
        ("hunyuan_v1_dense", {"attention_bias": True}, {}, "qkv_bias False in place of True"),
        ("gemma2", {"attn_logit_softcapping": None}, {}, "attention_softcap 50.0 in place of None"),
        ("phi3", {"sliding_window": 32}, {}, "layer 0 window None in place of"),
        ("ministral3", {"sliding_window": 32}, {}, "layer 0 window None in place of"),
        ("granite", {"partial_rotary_factor": 0.5}, {}, "rope.dimension_count is 8 of 16"),
        ("gemma3_text", {"query_pre_attn_scalar": 99}, {}, "with scale 0.25 in place of 0.1"),
        ("gemma3_text", {"sliding_window_pattern": 3}, {}, "layer 2"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, {}, "logit_softcap None in place of 30"),
        ("llama", {}, {"type": "dynamic", "factor": 4.0}, "no RoPE of the kind 'dynamic'.*=merged"),
        ("qwen2", {}, {"type": "llama3", "factor": 4.0}, "no RoPE of the kind 'llama3'"),
        (
            "llama",
            {},
            {"type": "yarn", "factor": 4.0, "truncate": False},
            "'yarn' with these values",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, {}, "rope.dimension_count is 8 of 16"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused_before_a_weight_is_read(
    tmp_path, family, fields, change, line
):
    base = RandomBase(family, **fields)
    longer = dataclasses.replace(base.spec.rope, **change)
    spec = dataclasses.replace(
        base.spec, rope=longer, max_length=int(base.spec.max_length * longer.factor)
    )
    with pytest.raises(ConfigError, match=line) as refusal:
        written(base, tmp_path, spec=spec)
    assert "\n" not in str(refusal.value) and not base.reads


def test_a_window_that_no_row_reaches_is_no_window(tmp_path):
    assert written(RandomBase("mistral", sliding_window=64), tmp_path)


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--dtype=q4_k_m is none of f32, f16, bf16, q8_0"):
        written(RandomBase(), tmp_path, "q4_k_m")


# ---------------------------------------------------------------- tokenizers
def train(pre_tokenizer, *, whole_words=False, normalizer=None, special=("<s>", "</s>"), **fields):
    """A byte-level tokenizer of this repository's own texts."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(Path(__file__))], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **fields
    )


def sentencepiece(prefix, user=()):
    """A tokenizer as those of Llama 2 (with a prefix) and Gemma are in tokenizer.json."""
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    replace = [normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * prefix + replace)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    words = Path(__file__).read_text().split()
    backend.train_from_iterator([" ".join(words[i : i + 8]) for i in range(0, 2000, 8)], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_tokenizer(tmp_path, tokenizer, **options):
    base = RandomBase("qwen2", tokenizer, vocab_size=options.pop("V", len(tokenizer)))
    return written(base, tmp_path, "f16", **options)


@pytest.mark.parametrize("name", [name for name in RULES if name != "default"])
def test_a_byte_level_tokenizer_keeps_its_rule(tmp_path, name):
    rule = RULES[name]
    normalizer = normalizers.NFC() if rule.composes else None
    tokenizer = train(rule.pre_tokenizer, whole_words=rule.whole_words, normalizer=normalizer)
    read = with_tokenizer(tmp_path, tokenizer).tokenizer()
    assert field(tmp_path, "tokenizer.ggml.pre") == name
    assert field(tmp_path, "tokenizer.ggml.add_bos_token") is False
    for text in [*TEXTS, "a</s>b<s>", Path(__file__).read_text()]:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_another_spelling_of_a_rule_has_its_name():
    spelled = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
                ),
                "removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    assert pre_tokenizer_name(train(spelled), True, False) == "llama-bpe"
    digits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert pre_tokenizer_name(train(digits), False, False) == "smollm"
    pairs = gguf_tokenizer._split(gguf_tokenizer.WORDS % r"\p{N}{1,2}")
    assert pre_tokenizer_name(train(pairs), True, False) is None


@pytest.mark.parametrize(
    "tokenizer,line",
    [
        (lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits texts in a way"),
        (lambda: train(RULES["qwen2"].pre_tokenizer, whole_words=True), "splits texts in a way"),
        (
            lambda: train(RULES["gpt-2"].pre_tokenizer, normalizer=normalizers.Lowercase()),
            "splits texts in a way",
        ),
        (
            lambda: transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
            ),
            "no tokenizer of the kind WordLevel",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path, tokenizer, line):
    with pytest.raises(ConfigError, match=line) as refusal:
        with_tokenizer(tmp_path, tokenizer())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_keeps_merges_prefix_and_bytes(tmp_path, prefix, caplog):
    tokenizer = sentencepiece(prefix)
    read = with_tokenizer(tmp_path, tokenizer).tokenizer()
    assert field(tmp_path, "tokenizer.ggml.model") == "llama"
    assert field(tmp_path, "tokenizer.ggml.add_space_prefix") is prefix
    assert field(tmp_path, "tokenizer.ggml.add_bos_token") is True
    types = field(tmp_path, "tokenizer.ggml.token_type")
    assert types[:4] == [2, 3, 3, 6] and types.count(6) == 256
    assert "other tokens" not in caplog.text
    for text in [*TEXTS, "def test_an_unknown_type_is_refused(tmp_path):"]:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_rows_without_a_token_and_tokens_without_a_row_are_said(tmp_path, caplog):
    tokenizer = train(RULES["gpt-2"].pre_tokenizer)
    with_tokenizer(tmp_path, tokenizer, V=len(tokenizer) + 8)
    assert field(tmp_path, "tokenizer.ggml.tokens")[-1] == f"[PAD{len(tokenizer) + 7}]"
    assert field(tmp_path, "tokenizer.ggml.token_type")[-1] == gguf.TokenType.UNUSED
    tokenizer.add_tokens(["<extra>"])
    with_tokenizer(tmp_path, tokenizer, V=len(tokenizer) - 1)
    assert "1 tokens beyond the model's" in caplog.text


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path):
    tokenizer = train(RULES["gpt-2"].pre_tokenizer)
    with pytest.raises(ConfigError, match="texts may hold 2 tokens beyond the model's"):
        with_tokenizer(tmp_path, tokenizer, V=len(tokenizer) - 2)


def test_special_tokens_ends_and_the_chat_template_are_kept(tmp_path):
    special = ("<s>", "</s>", "<|im_end|>", "<tool>")
    tokenizer = train(RULES["gpt-2"].pre_tokenizer, special=special)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    base = RandomBase("qwen2", tokenizer, vocab_size=len(tokenizer), eos_token_id=[1, 3])
    read = written(base, tmp_path, "f16", chat_template=template)
    assert field(tmp_path, "tokenizer.chat_template") == template
    assert field(tmp_path, "tokenizer.ggml.eot_token_id") == 2  # the end of a turn comes first
    assert end_tokens(read, read.tokenizer()) == {1, 2, 3}
    assert read.tokenizer()("a<|im_end|>")["input_ids"][-1] == 2


def test_ends_that_a_file_cannot_name_are_said_with_or_without_a_token(tmp_path, caplog):
    tokenizer = train(RULES["gpt-2"].pre_tokenizer)
    ends = [1, 5, 6, 7, len(tokenizer) + 5]  # the last has no token
    base = RandomBase("qwen2", tokenizer, vocab_size=len(tokenizer) + 8, eos_token_id=ends)
    written(base, tmp_path, "f16")
    assert f"not named are {tokenizer.convert_ids_to_tokens(7)}, id {ends[-1]}" in caplog.text


def test_a_gguf_base_keeps_the_metadata_of_its_tokenizer(tmp_path):
    first = written(RandomBase(), tmp_path)
    assert first.folder is None
    (tmp_path / "again").mkdir()
    written(first, tmp_path / "again", spec=spec_from_hf(first.config))
    files = [gguf.GGUFReader(folder / "m.gguf") for folder in (tmp_path, tmp_path / "again")]
    ours, theirs = (
        {k: (f.types, f.contents()) for k, f in file.fields.items() if k.startswith("tokenizer.")}
        for file in files
    )
    assert ours == theirs and len(ours) > 5
    written(first, tmp_path / "again", spec=spec_from_hf(first.config), chat_template="new")
    assert field(tmp_path / "again", "tokenizer.chat_template") == "new"


# ---------------------------------------------------------------- adapters
def trained(base, spec=None, targets=("q_proj", "k_proj", "down_proj"), **variant):
    model = Decoder(spec or stretched(base.spec, "linear"))
    lora.attach(model, rank=4, alpha=8.0, targets=targets, **variant)
    load_weights(model, base, dtype=jnp.float32)
    initialize(model, 0)
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        if variable.get_metadata("trainable"):
            value = rng.normal(size=variable.get_value().shape)
            variable.set_value(jnp.asarray(value, jnp.float32))
    return model


@pytest.mark.parametrize(
    "variant",
    [{}, {"rslora": True}, {"rank_pattern": (("k_proj", 2),), "alpha_pattern": (("k_proj", 3.0),)}],
    ids=str,
)
def test_the_factors_of_an_adapter_change_the_weights_of_the_file(tmp_path, variant):
    base = RandomBase()
    model = trained(base, **variant)
    options = write_lora_gguf(model, base, tmp_path / "m.gguf")
    assert options == ["--rope-scaling", "linear", "--rope-scale", "4"]
    assert field(tmp_path, "general.type") == "adapter"
    assert field(tmp_path, "adapter.type") == "lora"
    alpha = field(tmp_path, "adapter.lora.alpha")
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    layout = Layout(FAMILIES["llama"].gguf, base.spec.N, base.spec.K)
    expected = set()
    for _, weight, adapter in lora.adaptable(model):
        if adapter is None:
            continue
        for name in parts_of(model):
            if name not in weight.get_metadata("hf").replace("{layer}", "0"):
                continue
            theirs = gguf_places(name, layout.format)[0].name
            a, b = tensors[f"{theirs}.lora_a"], tensors[f"{theirs}.lora_b"]
            update = adapter.scale * np.asarray(adapter.a[0] @ adapter.b[0]).T
            wanted = layout.to_gguf(name, update.astype(np.float32))
            np.testing.assert_allclose(alpha / len(a) * b @ a, wanted, rtol=2e-5, atol=1e-4)
            expected.add(theirs)
    assert len(expected) == 3 and len(tensors) == 2 * 2 * 3


@pytest.mark.parametrize(
    "variant,line",
    [
        ({"dora": True}, "magnitudes of DoRA.*--format=gguf"),
        ({"also_train": ("embed", "norm")}, "the run trained"),
        ({"also_train": ("norm",)}, "the run trained .*norm"),
    ],
)
def test_what_an_adapter_of_llama_cpp_does_not_hold_is_refused(tmp_path, variant, line):
    base = RandomBase()
    model = trained(base, **variant)
    with pytest.raises(ConfigError, match=line) as refusal:
        write_lora_gguf(model, base, tmp_path / "m.gguf")
    assert "\n" not in str(refusal.value) and not (tmp_path / "m.gguf").exists()


def test_factors_of_experts_are_refused(tmp_path):
    base = RandomBase("qwen3_moe")
    model = trained(base, base.spec, targets=("q_proj", "down_proj"))
    with pytest.raises(ConfigError, match="factors of model.layers.0.mlp.experts.0.down_proj are"):
        write_lora_gguf(model, base, tmp_path / "m.gguf")


def test_an_adapter_under_a_rope_that_no_option_gives_is_refused(tmp_path):
    scaling = {"rope_type": "llama3", "original_max_position_embeddings": 32} | BASES["llama3"]
    base = RandomBase(rope_scaling=scaling)
    model = trained(base, stretched(base.spec, "llama3"))
    with pytest.raises(ConfigError, match="no options of its programs.*'llama3'.*--format=gguf"):
        write_lora_gguf(model, base, tmp_path / "m.gguf")
    unchanged = trained(base, base.spec)
    assert write_lora_gguf(unchanged, base, tmp_path / "m.gguf") == []


# ---------------------------------------------------------------- llama.cpp
LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)  # a Python with llama-cpp-python
LLAMA = Path(__file__).parents[2] / "scripts" / "bench" / "gguf_llama.py"


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """run(model, adapter, **job) -> what llama.cpp makes of a job, see gguf_llama.py."""
    if subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("needs llama-cpp-python, or LLAMA_PYTHON, a Python that has it")
    folder = tmp_path_factory.mktemp("llama")

    def run(model, adapter=None, **job):
        (folder / "job.json").write_text(json.dumps(job))
        options = {"model": model, "job": folder / "job.json", "out": folder / "out.npz"}
        options |= {"lora": adapter} if adapter else {}
        command = [LLAMA_PYTHON, LLAMA, *(f"--{name}={path}" for name, path in options.items())]
        subprocess.run(command, check=True)
        return dict(np.load(folder / "out.npz"))

    return run


def our_logits(model, tokens):
    ids = jnp.asarray([tokens])
    return np.asarray(model.logits(model(ids, positions=jnp.arange(ids.shape[1])[None])))[0]


def smooth(base):
    """Weights with which activations and scores keep their size."""
    zero_is_one = base.spec.norm_plus_one
    for name, array in base.arrays.items():
        one = name.endswith(("norm.weight", "scalar", "scale")) and not zero_is_one
        base.arrays[name] = array * 0.1 + one if array.ndim == 1 else array / array.shape[1] ** 0.5
        if base.spec.scale == 1 and name.endswith("q_norm.weight"):
            base.arrays[name] *= base.spec.H**-0.5
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,kind,fields",
    [
        ("llama", "yarn", {"attention_factor": 1.3}),
        ("mistral", "linear", {}),
        ("qwen2", "linear", {}),
        ("qwen3", "yarn", {}),
        ("gemma3_text", "linear", {}),
        ("granite", "yarn", {}),
        ("glm4", "yarn", {}),
        ("exaone4", "linear", {}),
        ("exaone4 32B", "linear", {}),
        ("olmo2", "yarn", {}),
        ("hunyuan_v1_dense", "yarn", {}),
        ("gemma2", "linear", {}),
        ("phi3", "longrope", {}),
        ("ministral3", "yarn", {}),
        ("gemma4_text", "proportional", {}),
        ("gemma4_text 26B", "proportional", {}),
        ("qwen3_moe", "yarn", {}),
        ("mixtral", "linear", {}),
        ("qwen2_moe", "linear", {}),
        ("ernie4_5_moe", "linear", {}),
        ("dots1", "yarn", {}),
        ("glm4_moe", "yarn", {}),
        ("solar_open", "yarn", {}),
        ("deepseek_v3", "yarn", {}),
        ("minimax_m2", "yarn", {}),
    ],
)
def test_llama_cpp_gives_our_logits_past_the_original_length(
    tmp_path, llama_cpp, family, kind, fields
):
    family, _, size = family.partition(" ")
    base = smooth(RandomBase(family, **SIZES.get(size, {})))
    spec = stretched(base.spec, kind, **fields)
    tokens = np.random.default_rng(0).integers(1, 4096, 200).tolist()
    model = Decoder(spec)
    load_weights(model, base, dtype=jnp.float32)
    ours = our_logits(model, tokens)
    for type, tolerance in (("f32", 1e-3), ("f16", 1e-2)):
        written(base, tmp_path, type, spec)
        theirs = llama_cpp(tmp_path / "m.gguf", tokens=tokens, first=0)["logits"]
        # float16 sends some tokens to other experts, and what follows attends to these
        share = 0.5 if type == "f16" and spec.has_experts else 1
        apart = np.quantile(np.abs(ours - theirs).max(-1), share)
        assert apart < tolerance * (ours.max() - ours.min())


@pytest.mark.slow
def test_llama_cpp_gives_our_logits_with_an_adapter_of_every_matrix(tmp_path, llama_cpp):
    base = smooth(RandomBase())
    targets = ("all-linear", "embed_tokens", "lm_head")
    model = trained(base, targets=targets, rank_pattern=(("k_proj", 2),))
    for _, variable in declared(model):
        if variable.get_metadata("trainable"):
            variable.set_value(variable.get_value() * 0.1)
    tokens = np.random.default_rng(0).integers(1, 4096, 200).tolist()
    written(base, tmp_path, spec=model.spec)
    write_lora_gguf(model, base, tmp_path / "lora.gguf")
    theirs = llama_cpp(tmp_path / "m.gguf", tmp_path / "lora.gguf", tokens=tokens, first=0)[
        "logits"
    ]
    ours = our_logits(model, tokens)
    assert np.abs(ours - theirs).max() < 1e-3 * (ours.max() - ours.min())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda rule=rule: train(rule.pre_tokenizer, whole_words=rule.whole_words)
            for name, rule in RULES.items()
            if name != "default" and not rule.composes
        ),
        lambda: sentencepiece(True),
        lambda: sentencepiece(False),
    ],
)
def test_llama_cpp_gives_the_tokens_of_transformers(tmp_path, llama_cpp, make):
    tokenizer = make()
    with_tokenizer(tmp_path, tokenizer)
    source = Path(__file__).read_text()
    texts = [*TEXTS, *(source[i : i + 300] for i in range(0, len(source), 300)), "a</s>b"]
    found = llama_cpp(tmp_path / "m.gguf", texts=texts)
    theirs = np.split(found["ids"], np.cumsum(found["lengths"])[:-1])
    for text, ids in zip(texts, theirs, strict=True):
        assert list(ids) == tokenizer(text)["input_ids"]
