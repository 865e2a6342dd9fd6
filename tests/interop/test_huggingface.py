import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lljax.errors import ModelError
from lljax.interop.huggingface import load_weights, tensors
from lljax.interop.open import open_base
from lljax.models import lora
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.parallel import sharding


def load(folder, dtype=jnp.float32, shardings=None, also_train=None):
    base = open_base(str(folder))
    model = Decoder(spec_from_hf(base.config))
    if also_train is not None:
        lora.attach(model, rank=2, alpha=4.0, targets=("q_proj",), also_train=also_train)
    load_weights(model, base, dtype=dtype, shardings=shardings)
    return base, model


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bitwise(hf_folder, family, tied, dtype):
    base, model = load(
        hf_folder(family, tied, dtype=dtype, shards="30KB"), jnp.dtype(str(dtype)[6:])
    )
    returned = dict(tensors(model))
    assert ("lm_head.weight" in returned) is not tied
    assert set(base.names()) - set(returned) <= {"lm_head.weight"}
    for name, array in returned.items():
        assert array.dtype == base.dtype(name)
        np.testing.assert_array_equal(array, base.read(name))


def test_trainable_weights_are_float32_and_frozen_ones_as_asked(hf_folder):
    _, model = load(hf_folder(), jnp.bfloat16, also_train=("embed", "norm"))
    for _, variable in declared(model):
        role, value = variable.get_metadata("role"), variable.get_value()
        if role.startswith("lora"):
            assert isinstance(value, jax.ShapeDtypeStruct)
        else:
            assert value.dtype == (jnp.float32 if role in ("embed", "norm") else jnp.bfloat16), role


def test_values_land_where_they_are_asked_to(hf_folder):
    mesh = sharding.make_mesh(fsdp=-1)
    _, model = load(
        hf_folder(),
        shardings=lambda v: sharding.value_sharding(mesh, v.get_metadata("axes"), v.get_value()),
    )
    for _, variable in declared(model):
        value = variable.get_value()
        wanted = sharding.value_sharding(mesh, variable.get_metadata("axes"), value)
        assert value.sharding.is_equivalent_to(wanted, value.ndim), variable.get_metadata("hf")
    assert any(not v.get_value().sharding.is_fully_replicated for _, v in declared(model))


def test_a_missing_tensor_is_named(hf_folder):
    folder = hf_folder()
    change(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(hf_folder):
    folder = hf_folder()
    change(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' has shape \(47,\).*\(48,\)"):
        load(folder)


def test_a_vocabulary_other_than_the_embedding_is_refused(hf_folder):
    folder = hf_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 130}))
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight' has shape \(128, 48\).*\(130, 48\)"
    ):
        load(folder)


def test_left_over_tensors_are_named_unless_they_are_harmless(hf_folder, caplog):
    folder = hf_folder()
    change(
        folder,
        lambda weights: weights.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    with caplog.at_level(logging.WARNING):
        load(folder)
        assert not caplog.records
        change(folder, lambda weights: weights.update({"model.extra.weight": torch.ones(4)}))
        load(folder)
    assert "model.extra.weight" in caplog.text and "inv_freq" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantized_base_is_refused_instead_of_read_without_its_scales(hf_folder, dtype):
    folder = hf_folder()

    def quantize(weights):
        for name in [name for name in weights if "_proj" in name]:
            weights[name] = (weights[name] * 100).to(dtype)
            weights[name + "_scale_inv"] = torch.full((1, 1), 0.01)

    change(folder, quantize)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ModelError, match="weight_block_size=None is not supported"):
        load(folder)
