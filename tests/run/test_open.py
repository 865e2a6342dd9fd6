import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.build import load_base, stretched
from lljax.interop.huggingface import load_weights
from lljax.interop.open import open_base
from lljax.interop.peft import write_adapter
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.families import rope_to_hf, spec_from_hf
from lljax.models.initialize import initialize
from lljax.run.open import open_base_models


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """A base under a stretched RoPE with factors that change it; and the folder of the adapter."""
    base, folder = open_base(tiny), tmp_path_factory.mktemp("adapter")
    model = Decoder(stretched(spec_from_hf(base.config), type="linear", factor="auto", length=64))
    lora.attach(model, rank=2, alpha=4.0, targets=("q_proj",), also_train=("norm",))
    load_weights(model, base, dtype=jnp.float32)
    initialize(model, 0, deviation=0.02, dtype=jnp.float32)
    for _, _, factors in lora.adaptable(model):
        if factors is not None:
            factors.b.set_value(jnp.full_like(factors.b.get_value(), 0.1))
    write_adapter(model, folder, base_name=tiny)
    (folder / "rope.json").write_text(json.dumps(rope_to_hf(model.spec)))
    return model, folder


def test_an_adapter_is_read_under_its_rope_and_told_from_others(adapted, tiny, tokenizer):
    model, folder = adapted
    models = open_base_models(tiny, folder)
    assert [model.name for model in models.models] == ["base", "base, RoPE stretched", "trained"]
    assert models.extended == model.spec and models.extended.max_length == 64
    loaded = [model.load() for model in models.models]
    assert [model.spec.max_length for model in loaded] == [32, 64, 64]
    read = jax.jit(
        lambda model: model.logits(
            model(jnp.arange(40)[None] % 300, positions=jnp.arange(40)[None])
        )
    )
    np.testing.assert_allclose(read(loaded[2]), read(model), atol=1e-5)
    assert not np.allclose(read(loaded[1]), read(model), atol=1e-3)

    key = lambda i: models.key(models.models[i], loaded[i], tokenizer)
    keys = {key(0), key(1), key(2)}
    assert len(keys) == 3 and key(2) in keys
    changed = next(factors.a for _, _, factors in lora.adaptable(loaded[2]) if factors is not None)
    changed.set_value(changed.get_value() + 1e-3)
    assert key(2) not in keys and key(2).startswith("trained ")


@pytest.mark.parametrize("form", ["none", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_key_knows_the_weights_the_tokenizer_and_what_ends_a_turn(form, tiny, tmp_path):
    def key(chat_template=None):
        models = open_base_models(str(tmp_path), None)
        model = load_base(models.base, models.extended, models.dtype, form)
        tokenizer = models.base.tokenizer()
        tokenizer.chat_template = chat_template
        return models.key(models.models[0], model, tokenizer), models.base.fingerprint()

    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (first, headers), again = key(), key()
    assert again == (first, headers)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-600:] = bytes(600)  # exported again: the headers and sizes are the same
    (tmp_path / "model.safetensors").write_bytes(weights)
    other, same_headers = key()
    assert same_headers == headers and other != first
    assert (
        len(
            {key(template)[0] for template in (None, "{{ messages }}", "{{ messages }}.")} | {other}
        )
        == 3
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert key()[0] != other


def test_a_base_alone_is_one_model(tiny):
    models = open_base_models(tiny, None)
    assert [model.name for model in models.models] == ["base"] and models.extended == spec_from_hf(
        open_base(tiny).config
    )
