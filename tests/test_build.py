"""A base that is scaled already, stretched further: what transformers computes under the exported
config is ours.
"""

import dataclasses
import json
import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from families import FAMILIES, SIZES, jit, torch_class, torch_logits, write_torch
from flax import nnx

from lljax.build import rope_change_warning, stretched
from lljax.errors import ConfigError
from lljax.interop.huggingface import load_weights
from lljax.interop.open import open_base
from lljax.models import rope
from lljax.models.decoder import Decoder
from lljax.models.families import rope_to_hf, spec_from_hf

ORIGINAL, LENGTH = 32, 128  # trained for, and stretched to; most bases read 64
TOKENS = np.random.default_rng(3).integers(0, 128, (1, LENGTH))
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": ORIGINAL,
    "rope_theta": 100.0,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": ORIGINAL,
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 1.2, 1.9, 2.3],
}
PHI3 = LONGROPE | {"partial_rotary_factor": 0.5}  # of a head of 16
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
OWN_LENGTH = {"max_position_embeddings": ORIGINAL}  # of linear and dynamic it is the original one
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}
# name: (family, its RoPE, other fields, the fields of the stretched RoPE that changed)
CASES = {
    "llama3": ("llama", LLAMA3, {}, {"factor": 4.0}),
    "yarn": ("llama", YARN, {}, {"factor": 4.0}),
    "yarn, beta_fast": ("llama", YARN | {"beta_fast": 4.0}, {}, {"factor": 4.0}),
    "yarn, beta_slow": ("llama", YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, {}, {"factor": 4.0}),
    "yarn, truncate": ("llama", YARN | {"truncate": False}, {}, {"factor": 4.0}),
    "yarn, attention_factor": ("llama", YARN | {"attention_factor": 1.7}, {}, {"factor": 4.0}),
    "yarn, mscale": ("llama", YARN | {"mscale": 1.0, "mscale_all_dim": 0.3}, {}, {"factor": 4.0}),
    "yarn, mscale in the scores": (
        "deepseek_v3",
        YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 3.0},
        {},
        {"factor": 4.0},
    ),
    "yarn, gpt_oss": ("gpt_oss", YARN | {"truncate": False}, {}, {"factor": 4.0}),
    "yarn, half of the head": (
        "glm4_moe",
        YARN | {"partial_rotary_factor": 0.5},
        {},
        {"factor": 4.0},
    ),
    "yarn, the whole head": (
        "glm4_moe",
        YARN | {"partial_rotary_factor": 1.0},
        {},
        {"factor": 4.0},
    ),
    "yarn, growing queries": (
        "ministral3",
        YARN | {"llama_4_scaling_beta": 0.5},
        {},
        {"factor": 4.0},
    ),
    "yarn, growing queries of latent attention": (
        "mistral4",
        YARN
        | {
            "llama_4_scaling_beta": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "partial_rotary_factor": 0.4,
        },
        {},
        {"factor": 4.0},
    ),
    "linear": ("qwen3", LINEAR, OWN_LENGTH, {"factor": 4.0}),
    "dynamic": ("llama", LINEAR | {"rope_type": "dynamic"}, OWN_LENGTH, {"factor": 4.0}),
    "longrope": (
        "llama",
        LONGROPE,
        {},
        {"factor": 4.0, "long_factor": (1.0, 1.2**2, 1.9**2, 2.3**2)},
    ),
    "longrope, attention_factor": (
        "llama",
        LONGROPE | {"attention_factor": 1.3},
        {},
        {"factor": 4.0, "long_factor": (1.0, 1.44, 3.61, 5.29)},
    ),
    "longrope, phi3": (
        "phi3",
        PHI3,
        {"hidden_size": 96, "original_max_position_embeddings": ORIGINAL},
        {"factor": 4.0, "long_factor": (1.0, 1.44, 3.61, 5.29)},
    ),
    "longrope, phi3 with an attention_factor": (
        "phi3",
        PHI3 | {"attention_factor": 1.3},
        {"hidden_size": 96, "original_max_position_embeddings": ORIGINAL},
        {"factor": 4.0, "long_factor": (1.0, 1.44, 3.61, 5.29)},
    ),
    "linear, by layer": ("gemma3_text", LOCAL | {"full_attention": LINEAR}, {}, {"factor": 4.0}),
    "yarn, by layer": (
        "gemma3_text",
        LOCAL | {"full_attention": YARN | {"truncate": False}},
        {},
        {"factor": 4.0},
    ),
    "yarn, by layer, olmo3": (
        "olmo3",
        LOCAL | {"full_attention": YARN},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"factor": 4.0},
    ),
    "dynamic, by layer": (
        "gemma3_text",
        LOCAL | {"full_attention": LINEAR | {"rope_type": "dynamic"}},
        OWN_LENGTH,
        {"factor": 4.0},
    ),
}


def fields_of(case):
    """The family of a case, and what its config has besides the sizes of tests/families.py."""
    family, parameters, fields, _ = CASES[case]
    layers = {"glm4_moe": 2, "deepseek_v3": 2, "mistral4": 2, "gemma3_text": 3, "olmo3": 2}
    layers = layers.get(family, 1)
    return family, {
        "num_hidden_layers": layers,
        "rope_parameters": json.loads(json.dumps(parameters)),
    } | fields


def config_of(case):
    family, fields = fields_of(case)
    config_class, others = FAMILIES[family]
    return json.loads(config_class(**(SIZES | others | fields)).to_json_string())


def longer(hf_config, type=None, factor="auto"):
    spec = spec_from_hf(hf_config)
    return spec, stretched(spec, type=type or spec.rope.type, factor=factor, length=LENGTH)


@jit
def at_length(graphdef, state, tokens, length):
    model = nnx.merge(graphdef, state)
    return model.logits(
        model(tokens, positions=jnp.arange(tokens.shape[1])[None], rope_length=length)
    )


def assert_transformers_agrees(base, spec):
    model = Decoder(spec)
    load_weights(model, base, dtype=jnp.float32)
    path = base.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | rope_to_hf(spec)))
    theirs = torch_class(spec.family).from_pretrained(base.folder, attn_implementation="eager")
    graphdef, state = nnx.split(model)
    for length in (ORIGINAL + 9, 70, LENGTH):
        ours = np.asarray(at_length(graphdef, state, jnp.asarray(TOKENS), length))[:, :length]
        np.testing.assert_allclose(
            ours, torch_logits(theirs, TOKENS[:, :length]), atol=1e-4, err_msg=str(length)
        )


@pytest.mark.parametrize("case", CASES)
def test_a_base_is_stretched_by_its_own_kind_and_keeps_every_other_field(case):
    before, after = longer(config_of(case))
    changed = {
        field.name: getattr(after.rope, field.name)
        for field in dataclasses.fields(rope.RopeSpec)
        if getattr(after.rope, field.name) != getattr(before.rope, field.name)
    }
    wanted = CASES[case][3]
    assert changed.keys() == wanted.keys()
    for name, value in changed.items():
        np.testing.assert_allclose(value, wanted[name])
    assert after == dataclasses.replace(before, rope=after.rope, max_length=LENGTH)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_of_a_stretched_base_reads_back_the_same(case):
    _, spec = longer(config_of(case))
    read = spec_from_hf(config_of(case) | json.loads(json.dumps(rope_to_hf(spec))))
    assert (read.rope, read.max_length, read.scale) == (spec.rope, LENGTH, spec.scale)
    assert read.temperature == spec.temperature
    assert [(local.type, local.theta) for local in read.more_ropes] == [
        (local.type, local.theta) for local in spec.more_ropes
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_rope_json_over_a_loaded_config_gives_what_an_exported_config_gives(tmp_path, case):
    """An adapter's rope.json goes to AutoConfig.from_pretrained with the base; transformers sets
    one entry after the other.
    """
    written = rope_to_hf(longer(config_of(case))[1])
    (tmp_path / "config.json").write_text(json.dumps(config_of(case)))
    over = transformers.AutoConfig.from_pretrained(tmp_path, **json.loads(json.dumps(written)))
    (tmp_path / "config.json").write_text(json.dumps(config_of(case) | written))
    exported = transformers.AutoConfig.from_pretrained(tmp_path)
    assert over.max_position_embeddings == exported.max_position_embeddings
    for wanted, got in zip(
        *(by_layer(config.rope_parameters) for config in (exported, over)), strict=True
    ):
        assert got["rope_theta"] and wanted.items() - {("type", "longrope")} <= got.items()


def by_layer(parameters):
    each = [
        parameters[name] for name in ("full_attention", "sliding_attention") if name in parameters
    ] or [parameters]
    return [{name: str(value) for name, value in of.items()} for of in each]


ALPHA = {"type": "dynamic", "alpha": 50.0, "factor": 1.0}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_base_with_a_fixed_alpha_is_read_and_written_without_it(name):
    """What is written does not stretch the base a second time, in either form of config.json."""
    hf = {"model_type": "hunyuan_v1_dense", "head_dim": 16, "rope_theta": 100.0, name: ALPHA}
    hf = SIZES | hf
    spec = spec_from_hf(hf)
    assert (spec.rope.type, spec.max_length) == ("default", SIZES["max_position_embeddings"])
    np.testing.assert_allclose(spec.rope.theta, 100 * 50 ** (16 / 14))
    for after in (spec, stretched(spec, type="yarn", factor="auto", length=256)):
        assert spec_from_hf(hf | json.loads(json.dumps(rope_to_hf(after)))) == after


FEW = ("llama3", "yarn, mscale in the scores", "longrope, phi3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FEW else pytest.mark.slow) for case in CASES]
)
def test_transformers_gives_our_logits_under_the_exported_config(tmp_path, case):
    family, fields = fields_of(case)
    write_torch(tmp_path, family, **fields)
    base = open_base(str(tmp_path))
    assert_transformers_agrees(base, longer(base.config)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case,type",
    [
        ("llama3", "yarn"),
        ("longrope", "yarn"),
        ("yarn, mscale in the scores", "linear"),
        ("dynamic", "yarn"),
        ("linear, by layer", "yarn"),
        ("yarn, gpt_oss", "linear"),
        ("yarn, half of the head", "linear"),
    ],
)
def test_transformers_gives_our_logits_under_another_kind(tmp_path, case, type):
    family, fields = fields_of(case)
    write_torch(tmp_path, family, **fields)
    base = open_base(str(tmp_path))
    assert_transformers_agrees(base, longer(base.config, type)[1])


@pytest.mark.parametrize(
    "case,type,fields",
    [
        ("llama3", "yarn", "factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0 are lost"),
        ("linear", "yarn", "its factor=2.0 are lost"),
        (
            "yarn, gpt_oss",
            "linear",
            "factor=2.0, beta_fast=32.0, beta_slow=1.0, truncate=False are lost",
        ),
        (
            "yarn, mscale in the scores",
            "linear",
            "beta_fast=3.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, truncate=True are lost",
        ),
        (
            "longrope",
            "yarn",
            r"short_factor=\[4 numbers\], long_factor=\[4 numbers\] are lost; "
            "context.rope.type='longrope' keeps",
        ),
    ],
)
def test_replacing_one_kind_by_another_says_what_is_lost(caplog, case, type, fields):
    with caplog.at_level(logging.WARNING):
        longer(config_of(case), type)
    (line,) = caplog.messages
    assert re.search(fields, line) and "\n" not in line


def test_a_fixed_attention_factor_stays_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert longer(config_of("yarn, attention_factor"))[1].rope.attention_factor == 1.7
        assert "attention_factor=1.7, which stays as the factor grows from 2 to 4" in caplog.text
        caplog.clear()
        longer(config_of("yarn"))
    assert not caplog.messages


def test_llama3_counts_from_the_length_that_the_base_reads():
    """Llama 3.1 reads 16 times what it was trained for with a factor of 8: twice as far is a factor
    of 16.
    """
    hf_config = config_of("llama3") | {"max_position_embeddings": 128}
    assert (
        stretched(spec_from_hf(hf_config), type="llama3", factor="auto", length=256).rope.factor
        == 4.0
    )
    assert (
        stretched(spec_from_hf(hf_config), type="llama3", factor=5.0, length=256).rope.factor == 5.0
    )
    with pytest.raises(
        ConfigError,
        match="context.rope.factor=3.0 stretches 64 tokens to 192.*length=256: use 'auto' or 4",
    ):
        stretched(spec_from_hf(hf_config), type="llama3", factor=3.0, length=256)


@pytest.mark.parametrize("type", ["yarn", "linear"])
def test_a_phi3_model_is_stretched_by_what_transformers_reads(type):
    with pytest.raises(ConfigError, match="reads a phi3 model.*use context.rope.type='longrope'"):
        longer(config_of("longrope, phi3"), type)


def test_a_dynamic_rope_of_sliding_layers_is_not_moved():
    local = {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}, "full_attention": YARN}
    with pytest.raises(ConfigError, match="sliding layers of this base have a dynamic RoPE"):
        longer(config_of("yarn, by layer") | {"rope_parameters": local})


def test_long_factors_of_interpolation_and_of_ntk_become_those_of_the_new_factor():
    ntk = [2.0**share for share in (0, 1 / 3, 2 / 3, 1)]
    for lists, wanted in ([2.0] * 4, [4.0] * 4), (ntk, [x**2 for x in ntk]):
        hf_config = config_of("longrope")
        hf_config["rope_parameters"]["long_factor"] = lists
        np.testing.assert_allclose(longer(hf_config)[1].rope.long_factor, wanted)


def test_an_adapter_that_goes_on_under_another_rope_is_said(tiny, tmp_path):
    base = open_base(tiny)
    spec = spec_from_hf(base.config)
    linear, yarn = (
        stretched(spec, type=type, factor="auto", length=128) for type in ("linear", "yarn")
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    assert not rope_change_warning(yarn, base, str(tmp_path))  # nothing is known of its RoPE
    (tmp_path / "rope.json").write_text(json.dumps(rope_to_hf(linear)))
    assert not rope_change_warning(linear, base, str(tmp_path))
    remark = rope_change_warning(yarn, base, str(tmp_path))
    assert re.search("trained under linear x4 over 32 tokens .* under yarn x4", remark)
