"""Bases, runs and adapters become models of a server."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_run_config
from safetensors.numpy import load_file, save_file
from serving.cases import client_of

from lljax.cli.export import main as export
from lljax.errors import ConfigError
from lljax.generation.completion import Request
from lljax.generation.generate import generate
from lljax.models.declare import declared
from lljax.models.quantize import FORMS, Quantized
from lljax.run import open as run_open
from lljax.run.loop import train
from lljax.run.open import open_base_models
from lljax.run.restore import restore_run
from lljax.serving import opening
from lljax.serving.opening import PLAIN, EngineOptions, load_adapter, open_adapters, open_run

OPTIONS = EngineOptions(rows=2)


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    """Compiling for a mesh takes longer; tests of the engine have one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (opening, run_open):
            patch.setattr(module, "generation_layout", lambda spec: None)
        yield


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run, OPTIONS)


@pytest.fixture(scope="module")
def run(tiny, documents, tmp_path_factory):
    """A finished run, and its adapter in PEFT's format."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    config = tiny_run_config(tiny, documents)
    config.context.schedule = ((2, 64, "full"),)
    train(config, workdir, devices=jax.devices()[:1])
    export([f"--workdir={workdir}", f"--out={workdir / 'peft'}"])
    return workdir


def answer(model, prompt, tokens=5):
    request = Request(prompt=prompt, tokens=tokens, adapter=model.adapter)
    return model.engine.run([request])[0].tokens


def test_a_run_is_served_beside_its_base(run, opened):
    models, _ = opened
    base, trained = models
    assert models.names == ["base", "mine"] and trained.parent == "base"
    assert (base.longest, trained.longest) == (32, 64)
    _, decoder, _ = restore_run(run)
    prompt = np.arange(40, 60)
    (expected,) = generate(decoder, [prompt], tokens=5)
    assert answer(trained, prompt) == expected.tokens


def test_equal_weights_are_the_same_arrays(opened):
    _, library = opened
    one, other = library._decoders.values()
    values = {path: variable.get_value() for path, variable in declared(one)}
    shared = [
        path
        for path, variable in declared(other)
        if path in values and variable.get_value() is values[path]
    ]
    assert len(shared) > len(values) / 2


def test_an_adapter_is_a_run_or_a_folder_of_peft(tiny, run):
    models, _ = open_adapters(tiny, {"run": str(run), "peft": str(run / "peft")}, OPTIONS)
    assert models.names == ["base", "run", "peft"] and models.get("run").root == str(run)
    _, decoder, _ = restore_run(run)
    prompt = np.arange(40, 60)
    (expected,) = generate(decoder, [prompt], tokens=5)
    for name in ("run", "peft"):
        assert answer(models.get(name), prompt) == expected.tokens


def test_an_adapter_is_loaded_and_unloaded_while_the_server_runs(tiny, run):
    models, library = open_adapters(tiny, {}, OPTIONS)
    ask = {"prompt": [50, 60], "max_tokens": 3, "temperature": 0, "model": "new"}
    with client_of(*models, adapters=library, allow_loading=True) as (client, service):
        body = {"lora_name": "new", "lora_path": str(run / "nowhere")}
        response = client.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 400 and "neither a run nor" in response.text
        body = {"lora_name": "new", "lora_path": str(run / "peft")}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.post("/v1/completions", json=ask).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
        assert client.post("/v1/completions", json=ask).status_code == 404
        assert list(library._decoders) == ["base"] and service.worker.engines == [library._engine]


def test_a_folder_that_is_no_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="neither a run nor an adapter"):
        open_adapters(tiny, {"x": str(tmp_path)}, OPTIONS)
    with pytest.raises(ConfigError, match="the name of the base"):
        open_adapters(tiny, {"base": str(tmp_path)}, OPTIONS)


def test_the_context_and_the_template_are_chosen_by_flags(tiny):
    models, _ = open_adapters(tiny, {}, EngineOptions(longest=16, chat_template=PLAIN))
    assert models.get("base").longest == 16
    assert "### Assistant" in models.get("base").tokenizer.chat_template
    models, _ = open_adapters(tiny, {}, EngineOptions(chat_template="{{ 1 }}"))
    assert models.get("base").tokenizer.chat_template == "{{ 1 }}"


def test_adapters_share_an_engine(tiny, run):
    models, _ = open_adapters(tiny, {"a": str(run), "b": str(run / "peft")}, OPTIONS)
    engine = models.get("a").engine
    assert engine is models.get("b").engine
    assert len({engine._variants.group(name) for name in (None, "a", "b")}) == 1, "in one batch"


def test_nothing_is_compiled_that_no_model_reads(tiny):
    _, library = open_adapters(tiny, {}, OPTIONS)
    with pytest.raises(ConfigError, match="--compile=999999: requests have up to"):
        library.compile(999_999)


def test_an_adapter_comes_on_the_weights_that_are_served(tiny, run):
    source = dataclasses.replace(open_base_models(tiny, None), quantize="nf4")
    decoder = load_adapter(source, run / "peft")
    kernel = decoder.layers[0].self_attn.q_proj.kernel.get_value()
    assert isinstance(kernel, Quantized) and kernel.form == FORMS["nf4"]


def test_an_adapter_that_is_not_finite_is_refused(tiny, run, tmp_path):
    shutil.copytree(run / "peft", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * np.nan
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="peft: layers.* has values that are not finite"):
        open_adapters(tiny, {"x": str(tmp_path / "peft")}, OPTIONS)


def test_a_path_that_is_no_path_is_refused(tiny):
    models, library = open_adapters(tiny, {}, OPTIONS)
    with client_of(*models, adapters=library, allow_loading=True) as (client, _):
        body = {"lora_name": "new", "lora_path": "a" * 5000}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
