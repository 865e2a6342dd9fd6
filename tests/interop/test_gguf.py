import json
import math
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from lljax.errors import ModelError
from lljax.interop import gguf as gguf_base
from lljax.interop import gguf_tokenizer
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.gguf_rope import LONG, SHORT, read_rope
from lljax.interop.huggingface import load_weights
from lljax.interop.open import end_tokens, open_base
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.rope import RopeSpec, frequencies, from_hf
from lljax.models.rope.kinds import base_frequencies

N, K, H, D, F, V, L = 8, 2, 8, 64, 96, 320, 2  # rows of 32 n: the block of quantized types
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
WORDS = [*BYTES, "ab", "abc", "Ġa", "<s>", "</s>"]


def weights(architecture, tied):
    """Random tensors under their GGUF names."""
    layer = {
        "attn_norm.weight": (D,),
        "ffn_norm.weight": (D,),
        "attn_q.weight": (N * H, D),
        "attn_k.weight": (K * H, D),
        "attn_v.weight": (K * H, D),
        "attn_output.weight": (D, N * H),
        "ffn_gate.weight": (F, D),
        "ffn_up.weight": (F, D),
        "ffn_down.weight": (D, F),
    }
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (N * H,), "attn_k.bias": (K * H,), "attn_v.bias": (K * H,)}
    if architecture in ("qwen3", "gemma3"):
        layer |= {"attn_q_norm.weight": (H,), "attn_k_norm.weight": (H,)}
    if architecture == "gemma3":
        layer |= {"post_attention_norm.weight": (D,), "post_ffw_norm.weight": (D,)}
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)} | (
        {} if tied else {"output.weight": (V, D)}
    )
    shapes |= {f"blk.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def write(
    path,
    architecture="llama",
    *,
    tied=False,
    kind=gguf.GGMLQuantizationType.F32,
    metadata=None,
    extra=None,
):
    """A GGUF file; `metadata` replaces entries, and drops those that are None. Returns its
    tensors.
    """
    words = WORDS + [f"<unused{i}>" for i in range(V - len(WORDS))]
    a = architecture
    entries = {
        f"{a}.context_length": 64,
        f"{a}.embedding_length": D,
        f"{a}.block_count": L,
        f"{a}.feed_forward_length": F,
        f"{a}.attention.head_count": N,
        f"{a}.attention.head_count_kv": K,
        f"{a}.attention.key_length": H,
        f"{a}.rope.dimension_count": H,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{a}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in ("<s>", "</s>") else 1 for word in words],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.bos_token_id": words.index("<s>"),
        "tokenizer.ggml.eos_token_id": words.index("</s>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        f"{a}.attention.sliding_window": 20 if a == "gemma3" else None,
    } | (metadata or {})
    tensors = weights(a, tied)
    writer = gguf.GGUFWriter(path, a)
    for key, value in entries.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }.get(type(value))
        if add:
            add(key, value)
    for name, array in (tensors | (extra or {})).items():
        if array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def read_all(path):
    base = open_base(str(path))
    model = Decoder(spec_from_hf(base.config))
    load_weights(model, base, dtype=jnp.float32)
    base.tokenizer()
    return base, model


def logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(model.logits(model(jnp.asarray(tokens), positions=positions)))


def assert_logits_of_transformers(path, model, tokens, atol):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # which for Gemma 3 it takes from the class' default, the file has no entry for it
    for layer in theirs.model.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    with torch.no_grad():
        wanted = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(model, tokens), wanted, atol=atol)
    return theirs


# transformers does not read the head size of a qwen3 file: its parity is held by the HF folder's
# tests.
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "architecture,tied",
    [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("gemma3", True)],
)
def test_logits_equal_those_of_transformers(tmp_path, architecture, tied):
    path = tmp_path / "model.gguf"
    write(path, architecture, tied=tied)
    base, model = read_all(path)
    assert base.config["tie_word_embeddings"] is tied
    assert_logits_of_transformers(
        path, model, np.random.default_rng(1).integers(0, V, (2, 100)), atol=2e-3
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tensors_have_hf_names_and_only_llamas_queries_and_keys_are_permuted(
    tmp_path, architecture
):
    written = write(tmp_path / "m.gguf", architecture)
    base, model = read_all(tmp_path / "m.gguf")
    v = base.read("model.layers.1.self_attn.v_proj.weight")
    q = base.read("model.layers.1.self_attn.q_proj.weight")
    k = base.read("model.layers.1.self_attn.k_proj.weight")
    np.testing.assert_array_equal(v, written["blk.1.attn_v.weight"])
    for array, name, heads in ((q, "blk.1.attn_q.weight", N), (k, "blk.1.attn_k.weight", K)):
        if architecture == "llama":  # llama.cpp's own forward permutation, applied to what we read
            array = array.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(-1, D)
        np.testing.assert_array_equal(array, written[name])
    assert bool(model.spec.qk_norm) == (architecture == "qwen3") and model.spec.qkv_bias == (
        architecture == "qwen2"
    )


@pytest.mark.parametrize(
    "kind,tolerance",
    [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 8e-3), ("Q5_0", 0.08), ("Q4_1", 0.08)],
)
def test_quantized_tensors_come_back_within_their_precision(tmp_path, kind, tolerance):
    written = write(tmp_path / "m.gguf", "qwen2", kind=gguf.GGMLQuantizationType[kind])
    base, _ = read_all(tmp_path / "m.gguf")
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
    ):
        array, exact = base.read(f"{ours}.weight"), written[f"{theirs}.weight"]
        assert array.shape == exact.shape and array.dtype == np.float32
        assert np.abs(array - exact).max() <= tolerance * np.abs(exact).max()


def test_metadata_becomes_a_config(tmp_path):
    write(
        tmp_path / "m.gguf",
        metadata={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 16,
        },
    )
    base = open_base(str(tmp_path / "m.gguf"))
    spec = spec_from_hf(base.config)
    assert (spec.V, spec.D, spec.N, spec.K, spec.H, spec.F, spec.L) == (V, D, N, K, H, F, L)
    assert (spec.max_length, spec.rope.theta, spec.tied) == (64, 5000.0, False)
    assert (spec.rope.type, spec.rope.factor, spec.rope.original_length) == ("yarn", 4.0, 16)
    assert base.config["eos_token_id"] == WORDS.index("</s>") and spec.norm_eps == pytest.approx(
        1e-5
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])  # of Llama 3.1 and 3.2
def test_the_rope_factors_of_llama_3_become_its_parameters(tmp_path, factor):
    spec = RopeSpec("llama3", theta=500_000.0, factor=factor, original_length=8192)
    factors = base_frequencies(spec.theta, H) / np.asarray(frequencies(spec, H, 0).inverse)
    write(
        tmp_path / "m.gguf",
        metadata={"llama.rope.freq_base": spec.theta},
        extra={"rope_freqs.weight": factors},
    )
    read = spec_from_hf(open_base(str(tmp_path / "m.gguf")).config).rope
    np.testing.assert_allclose(
        frequencies(read, H, 0).inverse, frequencies(spec, H, 0).inverse, rtol=1e-6
    )
    assert read.type == "llama3"


def test_the_betas_of_yarn_are_read(tmp_path):
    write(
        tmp_path / "m.gguf",
        metadata={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 16,
            "llama.rope.scaling.yarn_beta_fast": 8.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
    )
    read = spec_from_hf(open_base(str(tmp_path / "m.gguf")).config).rope
    assert read == RopeSpec("yarn", 5000.0, 4.0, 16, beta_fast=8.0, beta_slow=2.0)


@pytest.mark.parametrize(
    "key,value,line",
    [
        (
            "attention.layer_norm_rms_epsilon",
            math.nan,
            "epsilon is nan; it has to be a number above 0",
        ),
        ("attention.layer_norm_rms_epsilon", -1.0, "epsilon is -1.0"),
        ("attention.layer_norm_rms_epsilon", math.inf, "is inf"),
        ("rope.freq_base", math.nan, "freq_base is nan"),
        ("rope.freq_base", 1.0, "freq_base is 1.0; it has to be a number above 1"),
        ("block_count", 2.0, "block_count is 2.0; it has to be a whole number"),
        ("context_length", True, "context_length is True"),
        ("rope.dimension_count", 4, "dimension_count is 4 of 8 dimensions"),
        ("rope.scaling.factor", math.nan, "rope.scaling: factor is nan"),
        ("rope.scaling.attn_factor", math.nan, "attn_factor is nan"),
        ("rope.scaling.yarn_attn_factor", 1.5, "yarn_attn_factor is 1.5, which is not supported"),
        ("rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier is 0.1"),
    ],
)
def test_metadata_that_cannot_be_right_is_one_line(tmp_path, key, value, line):
    write(
        tmp_path / "m.gguf",
        metadata={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            f"llama.{key}": value,
        },
    )
    with pytest.raises(ModelError, match=line) as refusal:
        open_base(str(tmp_path / "m.gguf"))
    assert "\n" not in str(refusal.value)


def test_files_of_phi_3_have_longrope_and_do_not_name_it():
    tensors = {LONG: np.asarray([2.0, 3.0]), SHORT: np.asarray([1.0, 1.5])}
    fields = {"original_context_length": 64, "attn_factor": 1.25}
    read = read_rope(fields.get, tensors, theta=1e4, H=4, where="m.gguf")
    assert read == {
        "rope_type": "longrope",
        "factor": None,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "attention_factor": 1.25,
    }
    del fields["attn_factor"]  # the factor is not that of the lengths then, but 1
    read = read_rope(fields.get, tensors, theta=1e4, H=4, where="m.gguf")
    assert read and read["attention_factor"] == 1


def test_the_multiplier_of_yarn_is_read_for_architectures_that_have_it():
    """As converted files of Ministral 3 name mscale_all_dim, beside an mscale of 1."""
    fields = {"type": "yarn", "factor": 16.0, "yarn_log_multiplier": 0.7}
    fields["original_context_length"] = 64

    def read(**options):
        return read_rope(fields.get, {}, theta=1e4, H=4, where="m.gguf", **options)

    scaling = read(log_multiplier=1.0)
    fields["yarn_log_multiplier"] = 0.07
    assert read(log_multiplier=0.1) == scaling
    spec = from_hf({"max_position_embeddings": 1024, "rope_scaling": scaling})
    wanted = (0.1 * math.log(16) + 1) / (0.07 * math.log(16) + 1)
    assert frequencies(spec, 4, 1).scale == pytest.approx(wanted)
    with pytest.raises(ModelError, match="yarn_log_multiplier is 0.07, which is not supported"):
        read()


def test_rope_factors_of_another_rule_are_refused(tmp_path):
    write(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.array([1, 2, 5, 3], np.float32)})
    with pytest.raises(ModelError, match="rope_freqs"):
        open_base(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "architecture,kind,dtype",
    [
        ("qwen2", "F16", "float16"),
        ("qwen2", "Q8_0", "float16"),
        ("qwen2", "BF16", "bfloat16"),
        ("gemma3", "Q8_0", "bfloat16"),
    ],
)
def test_exports_are_in_a_type_that_holds_the_model(tmp_path, trained, architecture, kind, dtype):
    """Activations of Gemma overflow float16."""
    write(tmp_path / "m.gguf", architecture, tied=True, kind=gguf.GGMLQuantizationType[kind])
    base, model = trained(tmp_path / "m.gguf", targets=("q_proj",))
    export_merged(model, base, tmp_path / "out")
    out = open_base(str(tmp_path / "out"))
    assert out.config["torch_dtype"] == dtype and {
        str(out.dtype(name)) for name in out.names()
    } == {dtype}
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 has too
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert out.tokenizer()("abc a")["input_ids"] == base.tokenizer()("abc a")["input_ids"]


@pytest.mark.parametrize("export", [export_merged, export_peft, export_split])
def test_a_model_trained_over_a_gguf_file_is_exported_in_every_form(
    tmp_path, trained, logits, export
):
    write(tmp_path / "m.gguf", "llama", tied=True)
    base, model = trained(tmp_path / "m.gguf")
    names = {}
    exec(export(model, base, tmp_path / "out"), names)  # the commands it prints
    loaded = names["model"].float()
    tolerance = 2e-4 if export is export_peft else 3e-2  # the others are written in float16
    np.testing.assert_allclose(
        logits(loaded), logits(model), atol=tolerance * np.abs(logits(model)).max()
    )


def test_the_fingerprint_sees_tensors_behind_a_long_vocabulary(tmp_path):
    """The metadata of a real model is longer than a mebibyte; two models of one shape differ only
    behind it.
    """
    words = [f"{i:05d}" + "x" * 60 for i in range(20_000)]
    for name, tensor in (("a", "first"), ("b", "other")):
        write(
            tmp_path / f"{name}.gguf",
            metadata={"tokenizer.ggml.tokens": words},
            extra={f"{tensor}.weight": np.ones(4, np.float32)},
        )
    a, b = (open_base(str(tmp_path / f"{name}.gguf")).fingerprint() for name in "ab")
    assert (tmp_path / "a.gguf").stat().st_size == (tmp_path / "b.gguf").stat().st_size and a != b


# ---------------------------------------------------------------- the tokenizer
def test_the_tokenizer_keeps_specials_template_and_first_token(tmp_path):
    write(tmp_path / "m.gguf")
    tokenizer = open_base(str(tmp_path / "m.gguf")).tokenizer()
    ids = [WORDS.index(word) for word in ("<s>", "abc", "Ġa", "</s>")]
    assert tokenizer("abc a</s>")["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc a"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        == "hello"
    )


def test_no_first_token_where_the_file_says_so(tmp_path):
    write(tmp_path / "m.gguf", metadata={"tokenizer.ggml.add_bos_token": False})
    assert open_base(str(tmp_path / "m.gguf")).tokenizer()("abc")["input_ids"] == [
        WORDS.index("abc")
    ]


def byte_level(pre, words=(), merges=()):
    fields = {"model": "gpt2", "pre": pre, "tokens": [*BYTES, *words], "merges": list(merges)}
    return gguf_tokenizer.build("model.gguf", fields, None)


@pytest.mark.parametrize(
    "pre,pieces",
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-2", ["1234"]),
    ],
)
def test_numbers_are_split_as_the_model_learned_them(pre, pieces):
    words, merges = ["12", "123", "1234"], ["1 2", "12 3", "123 4"]
    assert byte_level(pre, words, merges).tokenize("1234") == pieces


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_any_text_comes_back(pre):
    tokenizer = byte_level(pre)
    for text in (
        "plain words",
        "  two\n\n\ttabs ",
        "na\u00efve \u65e5\u672c \U0001f642 1,234.5",
        "I'LL don't",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_qwen_composes_accents_first():
    """Its tokenizer.json normalizes to NFC."""
    tokenizer = byte_level("qwen2")
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_llama_3_takes_a_word_that_is_a_token_whole():
    """Its tokenizer.json has ignore_merges: some tokens cannot be reached by merging."""
    assert byte_level("llama-bpe", ["abc"]).tokenize("abc") == ["abc"]


def test_sentencepiece_vocabularies_merge_by_score_and_fall_back_to_bytes(tmp_path):
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "\u2581a",
    ]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -2.0, -1.0, -3.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 7
    fields = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = gguf_tokenizer.build("model.gguf", fields, None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == [
        "<s>",
        "\u2581a",
        "bc",
    ]
    text = "ab \u00e9 c"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def sentencepiece(tokens, **fields):
    return gguf_tokenizer.build(
        "model.gguf",
        {
            "model": "llama",
            "tokens": tokens,
            "scores": [0.0] * len(tokens),
            "token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
        }
        | fields,
        None,
    )


@pytest.mark.parametrize(
    "fields,bos",
    [
        ({}, "<s>"),
        ({"add_bos_token": False}, "<s>"),
        ({"bos_token_id": 2}, "</s>"),
        ({"bos_token_id": 2, "eos_token_id": 1}, "</s>"),
    ],
)
def test_metadata_without_bos_and_eos_has_those_of_llama_cpp(fields, bos):
    tokenizer = sentencepiece(["<unk>", "<s>", "</s>", "\u2581", "a"], **fields)
    assert (tokenizer.bos_token, tokenizer.unk_token) == (bos, "<unk>") and tokenizer.eos_token in (
        "<s>",
        "</s>",
    )
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == fields.get(
        "add_bos_token", True
    )


def test_long_tokens_cost_no_more_than_their_length(caplog):
    """Every one of 800 tokens is made of two others in as many ways as it has letters; one has a
    million.
    """
    with caplog.at_level("INFO"):
        tokenizer = sentencepiece(
            ["<unk>", "<s>", "</s>", "\u2581", *("a" * k for k in range(1, 800)), "b" * 1_000_000]
        )
    assert "544 tokens of more than 256 characters" in caplog.text
    assert tokenizer.convert_ids_to_tokens(
        tokenizer("aaaa", add_special_tokens=False)["input_ids"]
    )[-1].endswith("aa")


def test_the_tokens_that_end_a_turn_are_in_the_metadata(tmp_path):
    write(
        tmp_path / "m.gguf",
        metadata={"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 7},
    )
    base = open_base(str(tmp_path / "m.gguf"))
    assert end_tokens(base, base.tokenizer()) == {WORDS.index("</s>"), 5, 7}


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.embedding_length": None},
        {"llama.attention.head_count": [8, 8]},
        {"llama.attention.head_count": 0, "llama.attention.key_length": None},
        {"llama.embedding_length": "64"},
        {"llama.block_count": 3},
        {"llama.attention.head_count_kv": [2, 2]},
        {"llama.rope.scaling.type": "longrope"},
        {"llama.rope.scaling.type": "linear"},
        {"llama.attention.head_count_kv": 3},
        {"tokenizer.ggml.eos_token_id": 4000},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.bos_token_id": None},
        {"tokenizer.ggml.eos_token_id": "1"},
        {"tokenizer.ggml.bos_token_id": [1]},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.pre": "unheard of"},
    ],
    ids=str,
)
def test_metadata_that_makes_no_model_is_one_line(tmp_path, metadata):
    write(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelError) as error:
        read_all(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def test_another_architecture_is_refused_by_name(tmp_path):
    write(tmp_path / "m.gguf", "gemma")
    with pytest.raises(ModelError, match="'gemma'.*llama.*qwen2, .*qwen3"):
        open_base(str(tmp_path / "m.gguf"))


def test_damaged_files_are_one_line_or_sound(tmp_path):
    write(
        tmp_path / "m.gguf",
        metadata={
            "tokenizer.ggml.tokens": [*WORDS[:94], "ab"],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [1] * 95,
            "tokenizer.ggml.bos_token_id": 3,
            "tokenizer.ggml.eos_token_id": 4,
        },
    )
    whole, rng = (tmp_path / "m.gguf").read_bytes(), np.random.default_rng(0)
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3:
            for place in rng.integers(0, 4000, 2):  # the metadata and the table of tensors
                damaged[place] = rng.integers(256)
        else:
            del damaged[rng.integers(len(damaged)) :]
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            base = open_base(str(tmp_path / "d.gguf"))
            base.tokenizer()
            spec_from_hf(base.config)
            for name in base.names():
                base.read(name)
        except ModelError as error:
            assert "\n" not in str(error)


def test_an_array_of_a_wrong_length_is_not_read_on_and_on(tmp_path):
    """Of numbers: what lies behind the end of the file counts as nothing to the package, and takes
    no room in it.
    """
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    length = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for n in (2**62, gguf_base.MOST_VALUES - 1):
        (tmp_path / "d.gguf").write_bytes(
            whole[:length] + n.to_bytes(8, "little") + whole[length + 8 :]
        )
        with pytest.raises(ModelError, match=f"an array of {n}|beyond its end"):
            open_base(str(tmp_path / "d.gguf"))


def test_tensors_that_overlap_are_refused(tmp_path):
    write(tmp_path / "m.gguf", tied=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    into, of = (tensors[name].field.parts[-1] for name in ("output.weight", "token_embd.weight"))
    at = tensors["output.weight"].field.offset + sum(
        part.nbytes for part in tensors["output.weight"].field.parts[:-1]
    )
    assert whole[at : at + 8] == into.tobytes()
    whole[at : at + 8] = of.tobytes()
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(
        ModelError, match="'(output|token_embd).weight' and '(output|token_embd).weight' overlap"
    ):
        open_base(str(tmp_path / "m.gguf"))


# ---------------------------------------------------------------- a real file
@pytest.mark.slow
def test_smollm2_has_the_tensors_ids_and_logits_of_transformers(smollm2):
    path = smollm2
    base, model = read_all(path)
    tokenizer, text = (
        base.tokenizer(),
        Path(gguf_tokenizer.__file__).read_text() + "\u65e5\u672c \U0001f642 e\u0301  x",
    )
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(text)["input_ids"]
    assert ids == their_tokenizer(text)["input_ids"] and tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(
        chat, tokenize=False
    ) == their_tokenizer.apply_chat_template(chat, tokenize=False)
    theirs = assert_logits_of_transformers(path, model, np.array([ids[:512]]), atol=1e-3)
    state = theirs.state_dict()
    for name in base.names():
        np.testing.assert_array_equal(base.read(name), state[name].numpy())
