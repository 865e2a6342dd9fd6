"""Tiny random models as transformers saves them, and the same models here with an adapter that has
been trained.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from families import FAMILIES, our_logits, torch_logits, write_torch
from flax import nnx

from lljax.interop.adapter_init import ResidualBase, starts_from_base
from lljax.interop.huggingface import load_weights
from lljax.interop.open import open_base
from lljax.models import lora, rope
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.quantize import FORMS, abstract_quantized


class Trained(NamedTuple):
    base: object
    model: nnx.Module


def write_folder(folder, family="llama", tied=True, dtype=torch.float32, shards="5GB", **changes):
    """A folder with config, weights and tokenizer of a random model."""
    changes = {
        "num_hidden_layers": FAMILIES[family][1].get("num_hidden_layers", 2),
        "tie_word_embeddings": tied,
    } | changes
    write_torch(folder, family, dtype=dtype, shards=shards, **changes)
    return write_tokenizer(folder)


def write_tokenizer(folder):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w1", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    return folder


def train(
    folder,
    rope_type="linear",
    also_train=("embed", "norm"),
    targets=("q_proj", "v_proj", "down_proj"),
    rank=4,
    dtype=jnp.float32,
    quantize=None,
    **variant,
) -> Trained:
    """The base, and its model at 160 tokens with whatever trains moved at random."""
    base = open_base(str(folder))
    spec = spec_from_hf(base.config)
    stretched = rope.extend(
        spec.rope, type=rope_type, factor="auto", length=160, max_length=spec.max_length
    )
    model = Decoder(dataclasses.replace(spec, rope=stretched, max_length=160))
    lora.attach(model, rank=rank, alpha=8.0, targets=targets, also_train=also_train, **variant)
    for _, linear in lora.linear_layers(model) if quantize else ():
        linear.kernel.set_value(
            abstract_quantized(linear.kernel.get_value().shape, FORMS[quantize], dtype)
        )
    started = ResidualBase(base, model) if starts_from_base(model) else base
    load_weights(model, started, dtype=dtype)
    if started is not base:
        started.give_factors()
    initialize(model, 0)
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        if variable.get_metadata("trainable"):
            moved = variable.get_value() + rng.normal(size=variable.get_value().shape) * 0.1
            variable.set_value(jnp.asarray(moved, jnp.float32))
    return Trained(base, model)


@pytest.fixture
def hf_folder(tmp_path):
    """make(family, tied, ..., name=...) -> a folder of the test's own."""
    return lambda *args, name="base", **fields: write_folder(tmp_path / name, *args, **fields)


@pytest.fixture(scope="session")
def make_folder():
    """make(path, family, tied, ...) -> path, written."""
    return write_folder


@pytest.fixture(scope="session")
def add_tokenizer():
    return write_tokenizer


@pytest.fixture(scope="session")
def trained():
    return train


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A tied llama with linear RoPE, trained; for tests that leave its folder as it is."""
    return train(write_folder(tmp_path_factory.mktemp("example") / "base"))


@pytest.fixture
def logits():
    """The logits of the same tokens: of a torch model, or of one of ours."""
    return lambda model: (
        torch_logits(model) if isinstance(model, torch.nn.Module) else our_logits(model)
    )
