import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.build import stretched
from lljax.evaluation.candidates import of_base
from lljax.interop.base import end_tokens, open_base
from lljax.interop.huggingface import load_weights
from lljax.interop.peft import write_adapter
from lljax.models import lora, spec
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.models.spec import rope_to_hf


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """A base under a stretched RoPE with factors that change it; and the folder of the adapter."""
    base, folder = open_base(tiny), tmp_path_factory.mktemp("adapter")
    model = Decoder(stretched(spec.from_hf(base.config), type="linear", factor="auto", length=64))
    lora.attach(model, rank=2, alpha=4.0, targets=("q_proj",), also_train=("norm",))
    load_weights(model, base, dtype=jnp.float32)
    initialise(model, 0, deviation=0.02, dtype=jnp.float32)
    for _, _, factors in lora.adaptable(model):
        if factors is not None:
            factors.b.set_value(jnp.full_like(factors.b.get_value(), 0.1))
    write_adapter(model, folder, base_name=tiny)
    (folder / "rope.json").write_text(json.dumps(rope_to_hf(model.spec)))
    return model, folder


def test_an_adapter_is_read_under_its_rope_and_told_from_others(adapted, tiny):
    model, folder = adapted
    found = of_base(tiny, folder)
    assert [each.name for each in found.models] == ["base", "base, RoPE stretched", "trained"]
    assert found.extended == model.spec and found.extended.max_length == 64
    loaded = [each.load() for each in found.models]
    assert [each.spec.max_length for each in loaded] == [32, 64, 64]
    read = jax.jit(lambda model: model.logits(model(jnp.arange(40)[None] % 300, positions=jnp.arange(40)[None])))
    np.testing.assert_allclose(read(loaded[2]), read(model), atol=1e-5)
    assert not np.allclose(read(loaded[1]), read(model), atol=1e-3)

    key = lambda i, *more: found.key(found.models[i], loaded[i], *more)
    keys = {key(0), key(1), key(2), key(2, True), key(2, True, "int8")}
    assert len(keys) == 5 and key(2) in keys
    changed = next(factors.a for _, _, factors in lora.adaptable(loaded[2]) if factors is not None)
    changed.set_value(changed.get_value() + 1e-3)
    assert key(2) not in keys and key(2).startswith("trained ")


def test_a_base_alone_is_one_model(tiny):
    found = of_base(tiny, None)
    assert [each.name for each in found.models] == ["base"] and found.extended == spec.from_hf(open_base(tiny).config)


def test_what_ends_a_turn_is_the_tokenizers_and_the_models(tiny, tokenizer):
    base = open_base(tiny)
    assert end_tokens(base, tokenizer) == {0}
    for named, wanted in (([5, 7], {0, 5, 7}), (5, {0, 5}), (None, {0})):
        base = type("Base", (), {"generation_config": {"eos_token_id": named}})
        assert end_tokens(base, tokenizer) == wanted
