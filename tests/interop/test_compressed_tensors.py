"""transformers with compressed-tensors on folders that our writer quantized."""

import json

import numpy as np
import pytest
import torch
import transformers
from quantized_folders import quantize_folder

from lljax.interop import safetensors
from lljax.interop.layouts import Scheme
from lljax.interop.open import open_base

pytest.importorskip("compressed_tensors")
SCHEMES = {
    "W4A16": Scheme(4, group=128),
    "W4A16 by channel": Scheme(4, group=-1),
    "W8A16": Scheme(8, group=-1),
    "W8A16 in groups": Scheme(8, group=64),
    "fp8": Scheme(8, "float", -1),
}


@pytest.fixture
def both(hf_folder, tmp_path):
    """make(scheme, family, sizes) -> (the folder with quantized kernels, the same model with dense
    kernels).
    """

    def make(scheme, family="llama", **sizes):
        sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes
        folder = hf_folder(family, False, **sizes)
        quantize_folder(folder, tmp_path / "quantized", "compressed-tensors", scheme)
        base = open_base(str(tmp_path / "quantized"))
        dense = tmp_path / "dense"
        dense.mkdir()
        tensors = {name: np.array(base.read(name)) for name in base.names()}
        safetensors.write(
            dense / "model.safetensors", safetensors.layout(tensors.items()), tensors.__getitem__
        )
        config = dict(base.config)
        assert "lm_head" in config.pop("quantization_config")["ignore"]
        (dense / "config.json").write_text(json.dumps(config))
        return tmp_path / "quantized", dense

    return make


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def linears(model):
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_the_dequantized_model(both, logits, name):
    quantized, dense = both(SCHEMES[name], intermediate_size=256)
    wanted = load(dense)
    decompressed = transformers.CompressedTensorsConfig(dequantize=True)
    dequantized = load(quantized, quantization_config=decompressed)
    np.testing.assert_allclose(logits(dequantized), logits(wanted), atol=1e-4, rtol=1e-4)
    model = load(quantized)
    schemes = {
        name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")
    }
    assert schemes == set(linears(wanted)) - {"lm_head"}
    difference = np.abs(logits(model) - logits(wanted)).max() / np.abs(logits(wanted)).max()
    if name == "fp8":  # its activations are rounded too, to three bits
        assert 1e-3 < difference < 0.2
    else:
        assert difference < 1e-4


def test_experts_are_dequantized(both, logits):
    quantized, dense = both(Scheme(4, group=32), "qwen3_moe", moe_intermediate_size=64, head_dim=32)
    model, wanted = load(quantized), load(dense)
    np.testing.assert_allclose(logits(model), logits(wanted), atol=1e-4, rtol=1e-4)
    for name in ("gate_up_proj", "down_proj"):
        experts = [getattr(each.model.layers[1].mlp.experts, name) for each in (model, wanted)]
        assert torch.equal(*experts) and experts[0].std() > 0.01
