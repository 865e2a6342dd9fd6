import copy
import json
import os
import socket

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from lljax.errors import ModelError
from lljax.interop.folder import read_json
from lljax.interop.open import end_tokens, open_base, open_config, tokenizer_fingerprint


def test_a_folder_gives_its_config_tensors_and_tokenizer(hf_folder):
    folder = hf_folder("qwen3", dtype=torch.bfloat16)
    base = open_base(str(folder))
    assert base.config["model_type"] == "qwen3" and base.path == str(folder)
    assert base.shape("model.embed_tokens.weight") == (128, 48)
    assert (
        base.read("model.embed_tokens.weight").dtype
        == base.dtype("model.embed_tokens.weight")
        == ml_dtypes.bfloat16
    )
    assert base.tokenizer()("w3 w5")["input_ids"] == [3, 5]


def test_shards_and_one_file_are_the_same_base(hf_folder):
    whole, sharded = (
        open_base(str(hf_folder("llama", name=name, shards=shards)))
        for name, shards in (("whole", "5GB"), ("sharded", "40KB"))
    )
    assert len(sharded.tensors.files) > 2
    assert sorted(whole.names()) == sorted(sharded.names())
    for name in whole.names():
        np.testing.assert_array_equal(whole.read(name), sharded.read(name))


def test_a_local_folder_comes_before_a_hub_id_of_that_name(hf_folder, tmp_path, monkeypatch):
    hf_folder(name="Qwen/Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    assert open_base("Qwen/Qwen3-8B").config["hidden_size"] == 48


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """serve(files {name: content}, commits) stands in for the hub; returns what was asked:
    [(revision, files that came)].
    """

    def serve(files, commit="c0ffee"):
        asked, folder = [], tmp_path / "snapshots" / commit

        def snapshot_download(path, *, revision, allow_patterns):
            came = list(filter_repo_objects(files, allow_patterns=allow_patterns))
            asked.append((revision, came))
            for name in came:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(files[name])
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return serve


def test_of_a_hub_repository_the_shards_of_its_index_are_downloaded_and_no_other_weights(
    hf_folder, hub
):
    folder = hf_folder(shards="40KB")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    others = [
        "original/model.safetensors",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "model-00001-of-00009.safetensors",
        "metal/model.bin",
        "figures/a.json",
    ]
    beside = [
        "tokenizer.model",
        "modeling_x.py",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "tekken.json",
    ]
    asked = hub(files | dict.fromkeys([*others, *beside], b"x"))
    base = open_base("someone/some-model", "v1")
    assert len(weights) > 2 and sorted(base.names()) == sorted(open_base(str(folder)).names())
    assert {name for _, came in asked for name in came} == {*files, *beside}
    assert [revision for revision, _ in asked] == ["v1", "c0ffee"]  # all of one commit


def test_a_hub_repository_with_one_file_of_weights_is_asked_once(hf_folder, hub):
    files = {file.name: file.read_bytes() for file in hf_folder().iterdir()}
    asked = hub(files)
    assert (
        open_base("someone/some-model").names()
        and len(asked) == 1
        and sorted(asked[0][1]) == sorted(files)
    )


@pytest.mark.parametrize(
    "index",
    [b"{", b'{"weight_map": 5}', b'{"weight_map": {"a": "*"}}', b'{"weight_map": {"a": 7}}'],
)
def test_an_index_that_is_none_is_one_line(hf_folder, hub, index):
    files = {file.name: file.read_bytes() for file in hf_folder().iterdir()}
    asked = hub(files | {"model.safetensors.index.json": index, "other.safetensors": b"x"})
    with pytest.raises(ModelError, match="index") as error:
        open_base("someone/some-model").names()
    assert "\n" not in str(error.value) and not any(
        "other.safetensors" in came for _, came in asked
    )


@pytest.mark.parametrize(
    "path",
    [
        "/gone/models/tiny",
        "./models/tiny",
        "../tiny",
        "~/models/tiny",
        "models/tiny/",
        "a/b/c",
        ".tiny",
        "x" * 5000,
        "models/" + "x" * 5000,
        "gone.gguf",
        "./gone/model.gguf",
        "",
    ],
)
def test_the_hub_is_never_asked_for_a_path(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for open_it in (open_base, open_config):
        with pytest.raises(
            ModelError, match="no such f|there is no such file|config.json"
        ) as error:
            open_it(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_fingerprint_changes_with_the_config_and_the_tensors_and_with_nothing_else(hf_folder):
    folder = hf_folder(name="a")
    first = open_base(str(folder)).fingerprint()
    assert open_base(str(hf_folder(name="b"))).fingerprint() == first
    assert open_base(str(hf_folder(name="c", num_hidden_layers=3))).fingerprint() != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert open_base(str(folder)).fingerprint() != first


def test_the_tokenizer_fingerprint_sees_words_and_template(hf_folder):
    tokenizer = open_base(str(hf_folder())).tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    second = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["another"])
    assert len({first, second, tokenizer_fingerprint(tokenizer)}) == 3


@pytest.mark.parametrize(
    "path,line",
    [
        ("no/such/folder", "not a hub id either"),
        ("someone/some-model", "the hub does not give it"),
        ("missing.gguf", "there is no such file"),
        ("file.txt", "neither a folder nor a .gguf file"),
        ("empty", "has no config.json"),
        ("broken", "not JSON"),
        ("nested", "not JSON"),
        ("list", "not a JSON object"),
        ("~nobody-of-this-name/model", "no such folder"),
    ],
)
def test_what_is_no_base_is_one_line(tmp_path, monkeypatch, path, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    for folder, content in (
        ("empty", None),
        ("broken", "{"),
        ("nested", "[" * 200_000),
        ("list", "[]"),
    ):
        (tmp_path / folder).mkdir()
        if content:
            (tmp_path / folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=line) as error:
        open_base(path)
    assert "\n" not in str(error.value)


def test_weights_that_are_pickles_only_are_refused(hf_folder):
    folder = hf_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle"):
        open_base(str(folder)).names()


def test_a_folder_without_a_tokenizer_says_so_in_one_line(hf_folder):
    folder = hf_folder()
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="the tokenizer cannot be read") as error:
        open_base(str(folder)).tokenizer()
    assert "\n" not in str(error.value)


def test_json_that_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match="not JSON"):
        read_json(tmp_path / "x.json")


def test_json_is_read_from_a_regular_file_alone(tmp_path):
    """A pipe or a device would be read without end."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "device.json", "."):
        with pytest.raises(ModelError, match="there is no such file"):
            read_json(tmp_path / name)


# ---------------------------------------------------------------- what ends a text or a turn
def test_what_ends_a_turn_is_the_tokenizers_the_models_and_the_templates(
    tiny, tokenizer, monkeypatch
):
    base = open_base(tiny)
    assert end_tokens(base, tokenizer) == {0}
    for named, wanted in (([5, 7], {0, 5, 7}), (5, {0, 5}), (None, {0}), ([], {0})):
        monkeypatch.setattr(type(base), "generation_config", {"eos_token_id": named})
        assert end_tokens(base, tokenizer) == wanted
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<turn>"], special_tokens=True)
    added.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    assert end_tokens(base, added) == {0, added.convert_tokens_to_ids("<turn>")}


@pytest.mark.parametrize("named", [[[1]], {}, "1", 1.5, True, -1, [None]])
def test_ends_that_are_no_ids_are_one_line(named, tiny, tokenizer, monkeypatch):
    base = open_base(tiny)
    monkeypatch.setattr(type(base), "generation_config", {"eos_token_id": named})
    with pytest.raises(ModelError, match="eos_token_id is no id nor a list of ids"):
        end_tokens(base, tokenizer)
