"""The kinds of stage attention, and the patterns that they make."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lljax.attention.attend import UnsupportedAttention
from lljax.attention.pattern import FULL, KINDS, AttentionPattern, Groups, group_size
from lljax.config import default_config, validate
from lljax.errors import ConfigError
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import layout_of


@pytest.mark.parametrize(
    "group,T,tokens", [(0.25, 4096, 1024), (0.25, 1001, 250), (0.1, 8, 2), (2048, 8192, 2048)]
)
def test_group_is_a_share_or_a_number_of_tokens(group, T, tokens):
    assert group_size(group, T) == tokens


def test_every_kind_makes_its_pattern_from_the_configuration():
    context = default_config().context
    context.group, context.window, context.anchors = 0.25, 100, 3
    context.implementation = "blockwise"
    patterns = {kind: KINDS[kind](context, 1024, (7,)) for kind in KINDS}
    assert patterns == {
        "full": AttentionPattern("full", implementation="blockwise"),
        "shifted": AttentionPattern("shifted", group=256, implementation="blockwise"),
        "window": AttentionPattern(
            "window", window=100, anchors=3, markers=(7,), implementation="blockwise"
        ),
    }
    assert all(patterns[kind].kind == kind for kind in KINDS)


def test_only_shifted_patterns_have_groups():
    assert AttentionPattern("window", window=8).groups is None
    assert AttentionPattern("shifted", group=64).groups == Groups(64, 32)
    assert AttentionPattern("shifted", group=64, shift=False).groups == Groups(64, 0)


# ---------------------------------------------------------------- context.implementation
SPEC = spec_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)


def test_the_configuration_takes_the_names_of_the_table():
    config = default_config()
    config.model.path, config.data.train = "base", ("rows.jsonl",)
    validate(config)
    config.context.implementation = "flash9"
    with pytest.raises(ConfigError, match="context.implementation"):
        validate(config)


def test_the_pattern_names_the_implementation_of_every_layer():
    graphdef, state = nnx.split(Decoder(SPEC))

    def hidden(name):
        tokens = positions = jnp.arange(16, dtype=jnp.int32)[None]
        pattern = dataclasses.replace(FULL, implementation=name)
        return jax.eval_shape(
            lambda state: nnx.merge(graphdef, state)(tokens, positions=positions, pattern=pattern),
            state,
        )

    assert hidden("blockwise").shape == hidden("auto").shape == (1, 16, 32)
    with pytest.raises(UnsupportedAttention, match="'triton' cannot serve devices of platform cpu"):
        hidden("triton")


def test_an_implementation_for_other_devices_is_refused_before_anything_is_built():
    mesh, pattern = make_mesh(sequence=8), AttentionPattern(implementation="tpu")
    with pytest.raises(ConfigError, match="='tpu' cannot serve devices of platform cpu"):
        layout_of(mesh, "auto", pattern, 64, SPEC)
