"""Logits equal transformers' (torch, float32) for every family and every RoPE kind, beyond the original length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from lljax.interop.base import open_base
from lljax.interop.huggingface import load_weights, tensors
from lljax.models.decoder import Decoder
from lljax.models.spec import from_hf

SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied, own head size": {"tie_word_embeddings": True, "head_dim": 16, "num_attention_heads": 9,
                                  "num_key_value_heads": 3, "hidden_size": 72},
    "mistral": {"sliding_window": 20, "head_dim": 8, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with a window in the upper layers": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 6},
}
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, every option": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
                           "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32},
}


def build(tmp_path, family, scaling, seed=0):
    """A random torch model of the family, saved, and ours read back from the files."""
    torch.manual_seed(seed)
    kind = family.split()[0]
    config_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig,
                    "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    fields = SIZES | FAMILIES[family]
    parameters = {"rope_theta": 5000.0, **(scaling or {"rope_type": "default"})}
    H = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    if parameters["rope_type"] == "longrope":
        rng = np.random.default_rng(seed)
        parameters |= {name: [float(x) for x in rng.uniform(1, 6, H // 2)] for name in ("short_factor", "long_factor")}
    config = config_class(**fields, rope_parameters=parameters, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():                    # norms and biases away from their trivial start
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    base = open_base(str(tmp_path))
    ours = Decoder(from_hf(base.config))
    load_weights(ours, base, dtype=jnp.float32)
    return theirs, ours


def logits(ours, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _logits(*nnx.split(ours), jnp.asarray(tokens), positions)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens, positions):
    model = nnx.merge(graphdef, state)
    return model.logits(model(tokens, positions=positions))


def assert_parity(theirs, ours, length):
    tokens = np.random.default_rng(1).integers(0, 128, size=(2, length))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(ours, tokens), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ROPES)
def test_logits_equal_transformers(tmp_path, family, kind):
    theirs, ours = build(tmp_path, family, ROPES[kind])
    assert_parity(theirs, ours, 150)         # beyond max_position_embeddings = 64


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_kinds_that_depend_on_the_length_below_the_original(tmp_path, kind):
    assert_parity(*build(tmp_path, "llama", ROPES[kind]), 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_return_bitwise(tmp_path, family):
    _, ours = build(tmp_path, family, None)
    base = open_base(str(tmp_path))
    returned = dict(tensors(ours))
    assert set(returned) == set(base.names()) - ({"lm_head.weight"} if ours.spec.tied else set())
    for name, array in returned.items():
        np.testing.assert_array_equal(array, base.read(name))
