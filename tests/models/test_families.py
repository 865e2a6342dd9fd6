"""The table of families: one row is enough for a family, and nothing but its row knows its name."""

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_base
from families import our_logits
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lljax
from lljax.errors import ModelError
from lljax.hardware.chips import DEVICES
from lljax.hardware.targets import Target
from lljax.interop.export import export_merged
from lljax.interop.huggingface import load_weights
from lljax.interop.multimodal import text_model
from lljax.interop.open import open_base
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, is_tied, rope_to_hf, spec_from_hf
from lljax.models.families.family import (
    Family,
    MultimodalModel,
    Names,
    first_set,
    local_layers,
)
from lljax.models.spec import LayerSpec, QKNorm
from lljax.models.values import whole
from lljax.planning import plan
from lljax.run.restore import restore_run


def toy_decoder(c):
    slides = local_layers(c, lambda i: i % 2)
    return {
        "qk_norm": QKNorm(),
        "norm_plus_one": True,
        "layers": tuple(
            LayerSpec(window=first_set(c, "toy_window") if s else None) for s in slides
        ),
    }


TOY = Family(
    model_type="toy",
    architecture="ToyForCausalLM",
    defaults={"max_position_embeddings": 32, "toy_window": 10, "tie_word_embeddings": True},
    decoder=toy_decoder,
    checks={"toy_window": whole(2)},
    rope_to_hf=lambda spec, entries: entries | {"toy_rope": spec.rope.type},
    rope_fields=("toy_rope",),
    multimodal_parents=(
        MultimodalModel("toy_vision", names=(Names("text.model", "text.lm_head"),), tied=True),
    ),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)


@pytest.mark.slow
def test_a_family_from_outside_trains_plans_exports_and_is_read_back(
    toy, train_on_one_device, run_config, tmp_path, monkeypatch
):
    c = run_config
    c.model.path = write_base(tmp_path / "base", model_type="toy", architectures=None)
    c.context.length, c.context.schedule = 64, ((2, 64, "full"),)
    c.data.valid_fraction, c.training.rows, c.mesh.fsdp = 0.0, 1, 1
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1])
    (planned,) = plan.plan(
        c, open_base(c.model.path).config, Target("toy", DEVICES["h100-80g"], 1), plan.Options()
    )
    assert planned.fits

    train_on_one_device(c, tmp_path / "run")
    _, model, base = restore_run(tmp_path / "run")
    assert model.spec.family == "toy" and [layer.window for layer in model.spec.layers] == [
        None,
        10,
    ]
    export_merged(model, base, tmp_path / "merged")

    merged = open_base(str(tmp_path / "merged"))
    assert merged.config["toy_rope"] == "yarn"
    again = Decoder(spec_from_hf(merged.config))
    assert again.spec == model.spec
    load_weights(again, merged, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 300, size=(1, 60))
    np.testing.assert_allclose(our_logits(again, tokens), our_logits(model, tokens), atol=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(merged.read(name), base.read(name))  # it has trained


def test_a_row_checks_ties_and_unwraps(toy):
    hf = json.loads(
        '{"model_type": "toy", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,'
        ' "num_hidden_layers": 2, "num_attention_heads": 2}'
    )
    spec = spec_from_hf(hf)
    assert spec.tied and is_tied(hf) and spec.max_length == 32
    assert rope_to_hf(spec)["toy_rope"] == "default"
    with pytest.raises(ModelError, match="toy_window is 1"):
        spec_from_hf(hf | {"toy_window": 1})
    inside = {name: value for name, value in hf.items() if name != "model_type"}
    config, whole = text_model({"model_type": "toy_vision", "text_config": inside})
    assert config == hf | {"architectures": ["ToyForCausalLM"], "tie_word_embeddings": True}
    assert whole.model.names[0].of("model.norm.weight") == "text.model.norm.weight"


def test_rows_name_the_classes_of_transformers():
    without_auto_class = {"mistral4": "Mistral4ForCausalLM"}
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | without_auto_class
    assert {name: row.architecture for name, row in FAMILIES.items()} == {
        name: named[name] for name in FAMILIES
    }
    assert all(name == row.model_type for name, row in FAMILIES.items())


ROOT = Path(lljax.__file__).parent
READERS = ("models/spec.py", "build.py", "api.py", "interop", "planning", "run", "training")
# Strings that are spelled like families: tokenizers of GGUF files, a file of a tokenizer, a field.
OTHER_THINGS = {"llama", "llama-bpe", "qwen2", "smollm", "qwen.tiktoken", "seed"}


def strings(path):
    """The string constants of a module, docstrings excepted."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


NO_FAMILY = re.compile(r"llama3|llama\.cpp|llama-server|ollama")  # a RoPE kind, and programs


def test_no_reader_of_the_table_names_a_family():
    stems = {re.match("[a-z]+", name)[0] for name in FAMILIES}
    words = {*FAMILIES, *(stem for stem in stems if len(stem) > 3)}  # qwen, gemma; not gpt
    family = re.compile("|".join(sorted(words)), re.IGNORECASE)
    files = [file for part in READERS for file in sorted((ROOT / part).rglob("*.py"))]
    files += [ROOT / part for part in READERS if part.endswith(".py")]
    named = [
        (str(file.relative_to(ROOT)), text)
        for file in files
        if file.name != "hub.py"  # licenses are named after models
        for text in strings(file)
        if text not in OTHER_THINGS and family.search(NO_FAMILY.sub("", text))
    ]
    assert len(files) > 40 and not named
