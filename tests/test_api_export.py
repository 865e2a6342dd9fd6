"""lljax.export and lljax.generate."""

import json
from pathlib import Path

import pytest

import lljax
from lljax.data.template import PLAIN_TEMPLATE
from lljax.errors import ConfigError
from lljax.models.decoder import Decoder


@pytest.fixture(scope="module")
def prepared(tiny):
    model, tokenizer = lljax.prepare_model(tiny)
    return lljax.prepare_model(model, {"r": 4, "target_modules": ["q_proj"]}), tokenizer


@pytest.mark.parametrize(
    "format,file",
    [
        ("peft", "adapter_model.safetensors"),
        ("merged", "model.safetensors"),
        ("split", "adapter/adapter_model.safetensors"),
    ],
)
def test_a_model_is_exported_in_every_format(prepared, tmp_path, format, file):
    commands = lljax.export(prepared[0], tmp_path / "out", format=format)
    assert (tmp_path / "out" / file).is_file() and "from_pretrained" in commands
    with pytest.raises(ConfigError, match="--overwrite"):
        lljax.export(prepared[0], tmp_path / "out", format=format)
    lljax.export(prepared[0], str(tmp_path / "out"), format=format, overwrite=True)


def test_an_export_names_its_base_by_an_absolute_path(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny).parent)
    model, _ = lljax.prepare_model(Path(tiny).name, {"r": 4, "target_modules": ["q_proj"]})
    monkeypatch.chdir(tmp_path)
    commands = lljax.export(model, "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    assert f"from_pretrained({str(tiny)!r}" in commands


@pytest.mark.parametrize(
    "statistics,template",
    [({"conversations": 3}, PLAIN_TEMPLATE), ({"conversations": 0}, None), ({}, PLAIN_TEMPLATE)],
)
def test_the_template_of_trained_conversations_goes_along(
    prepared, tmp_path, monkeypatch, statistics, template
):
    (tmp_path / "data_statistics.json").write_text(json.dumps({"train": statistics}))
    monkeypatch.setattr(prepared[0], "workdir", str(tmp_path), raising=False)
    lljax.export(prepared[0], tmp_path / "out", format="merged")
    path = tmp_path / "out" / "chat_template.jinja"
    assert (path.read_text() if path.exists() else None) == template


def test_what_cannot_be_exported_is_one_line(prepared, tmp_path, tiny):
    with pytest.raises(ConfigError, match="format='onnx' is none of peft, merged, split"):
        lljax.export(prepared[0], tmp_path / "out", format="onnx")
    with pytest.raises(ConfigError, match="option='grup' is none of"):
        lljax.export(prepared[0], tmp_path / "out", format="w4a16", grup=32)
    with pytest.raises(ConfigError, match="--format=peft: it exports an adapter"):
        lljax.export(lljax.prepare_model(tiny)[0], tmp_path / "out")
    for call in (
        lambda: lljax.export(Decoder, tmp_path / "out"),
        lambda: lljax.generate(Decoder, prepared[1], "x"),
    ):
        with pytest.raises(ConfigError, match="not one of lljax.prepare_model"):
            call()


def test_a_text_and_a_conversation_are_continued(prepared):
    model, tokenizer = prepared
    text = lljax.generate(model, tokenizer, "def add(", tokens=8)
    assert isinstance(text, str) and text
    assert lljax.generate(model, tokenizer, "def add(", tokens=8, temperature=50.0, seed=1) != text
    chat = lljax.generate(model, tokenizer, [{"role": "user", "content": "add"}], tokens=8)
    assert chat == lljax.generate(model, tokenizer, "### User:\nadd\n### Assistant:\n", tokens=8)
    with pytest.raises(ConfigError, match="the prompt is .* not empty"):
        lljax.generate(model, tokenizer, "")
    with pytest.raises(ConfigError, match="heat is none of tokens, stop, temperature"):
        lljax.generate(model, tokenizer, "def", heat=1.0)


@pytest.mark.parametrize(
    "prompt,fields,message",
    [
        ("def " * 40, {}, "and the model reads 32"),
        (["def"], {}, "refuses the conversation|no role"),
        (5, {}, "not empty"),
        ("def", {"stop": "abc"}, "stop='abc' is not a tuple"),
        ("def", {"stop": ("",)}, "stop"),
        ("def", {"tokens": 0}, "tokens=0"),
    ],
)
def test_a_prompt_that_cannot_be_continued_as_it_is_meant_is_refused(
    prepared, prompt, fields, message
):
    with pytest.raises(ConfigError, match=message) as refused:
        lljax.generate(*prepared, prompt, **fields)
    assert "\n" not in str(refused.value)
