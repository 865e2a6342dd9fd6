"""A tokenizer is what its folder says, whatever the class that transformers would take for it."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lljax.errors import ModelError
from lljax.interop.open import open_base
from lljax.interop.tokenizer import PROBES

TEXT = ["hello world, two  spaces and    four\n\tdef f(x): return x[0] + 1  # 12345", *PROBES]
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
}


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    return backend


def byte_level(bos: bool = False) -> tokenizers.Tokenizer:
    """As Llama 3's and DeepSeek's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return backend


@pytest.fixture
def folder(tmp_path):
    def make(backend, config=None, **model):
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | model))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def opened(folder):
    return open_base(str(folder)).tokenizer()


@pytest.mark.parametrize("backend", [metaspace, byte_level])
@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "PreTrainedTokenizerFast"]
)
def test_ids_are_those_of_tokenizer_json_under_every_class(folder, backend, kind):
    own = backend()
    tokenizer = opened(folder(own, LLAMA | {"tokenizer_class": kind}))
    for text in (*PROBES, "x" + " " * 9 + "y", "  "):
        wanted = own.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "config,before,after",
    [
        ({}, None, []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, None, [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_bos_and_eos_are_added_as_the_config_says_or_else_tokenizer_json(
    folder, bos, config, before, after
):
    tokenizer = opened(folder(byte_level(bos), LLAMA | config))
    before = [1] * bos if before is None else before
    plain = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer("hello")["input_ids"] == [*before, *plain, *after]


def test_tokens_that_only_the_config_adds_have_the_ids_it_gives_or_are_refused(folder):
    added = {
        "content": "<more>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    size = byte_level().get_vocab_size()
    tokenizer = opened(folder(byte_level(), LLAMA | {"added_tokens_decoder": {str(size): added}}))
    assert tokenizer("<more>")["input_ids"] == [size]
    message = f"'<more>' has the id {size + 7} in tokenizer_config.json and {size} in"
    with pytest.raises(ModelError, match=message):
        opened(folder(byte_level(), LLAMA | {"added_tokens_decoder": {str(size + 7): added}}))


def test_what_transformers_reads_as_another_is_refused_with_the_difference(folder, monkeypatch):
    wrong = byte_level()
    wrong.normalizer = normalizers.Strip()
    wrong = transformers.PreTrainedTokenizerFast(tokenizer_object=wrong)
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: wrong
    )
    message = r"transformers makes \[.*\] of ' one leading space', and tokenizer.json \[.*\]"
    with pytest.raises(ModelError, match=message):
        opened(folder(byte_level(), LLAMA))


@pytest.mark.parametrize(
    "config,eos", [({}, "</s>"), ({"eos_token": None}, None), ({"eos_token": "<unk>"}, "<unk>")]
)
def test_config_json_names_the_end_of_a_text_where_the_tokenizer_does_not(folder, config, eos):
    assert opened(folder(byte_level(), config, eos_token_id=[2, 0])).eos_token == eos


@pytest.mark.parametrize(
    "config",
    [
        {"model_max_length": "long"},
        {"chat_template": 5},
        {"add_bos_token": "yes"},
        {"eos_token": 5},
        {"bos_token": ["<s>"]},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"3": "y"}},
        {"add_bos_token": True, "bos_token": None},
    ],
)
def test_a_field_of_the_wrong_type_is_one_line(folder, config):
    with pytest.raises(ModelError, match="the tokenizer cannot be read") as error:
        opened(folder(byte_level(), LLAMA | config))
    assert "\n" not in str(error.value)


def test_a_panic_of_the_tokenizer_is_one_line(folder):
    """It is no Exception in Python."""
    backend = byte_level()
    backend.normalizer = normalizers.Replace(tokenizers.Regex(""), "x")
    with pytest.raises(ModelError, match="cannot be read .index out of bounds") as error:
        opened(folder(backend, LLAMA))
    assert "\n" not in str(error.value)


def test_a_tokenizer_written_in_python_is_refused(folder, monkeypatch):
    path = folder(byte_level(), LLAMA)
    (path / "tokenizer.json").unlink()
    slow = type("Slow", (), {"is_fast": False})()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    with pytest.raises(ModelError, match="Slow is written in Python.*: add a tokenizer.json"):
        opened(path)


# ---------------------------------------------------------------- of real models
REAL = ("llama2", "llama3_1", "qwen3", "gemma3", "deepseek_v3", "gptoss")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_are_their_own(folder, name):
    """LLJAX_TOKENIZERS: a folder of folders with tokenizer.json and tokenizer_config.json."""
    source = Path(os.environ.get("LLJAX_TOKENIZERS", "")) / name
    if not (source / "tokenizer.json").is_file():
        pytest.skip("needs LLJAX_TOKENIZERS")
    config = json.loads((source / "tokenizer_config.json").read_text())
    own = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer = opened(folder(own, config))
    for text in (*PROBES, "  two", "    x = 1"):
        ids = own.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    if "add_bos_token" in config:
        starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        assert starts is config["add_bos_token"]
