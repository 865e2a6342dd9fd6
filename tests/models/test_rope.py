"""Every RoPE kind against transformers' (torch, float32): frequencies, rotation, and config.json in
and out.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lljax.errors import ConfigError, ModelError
from lljax.models import rope
from lljax.models.rope import RopeSpec
from lljax.models.rope import kinds as rope_kinds


def factors(H, seed):
    return [float(x) for x in np.random.default_rng(seed).uniform(1, 40, H // 2)]


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS = {  # name: (max_position_embeddings, rope_parameters)
    "default": (4096, {"rope_type": "default"}),
    "linear": (4096, {"rope_type": "linear", "factor": 8.0}),
    "linear, uneven factor": (4096, {"rope_type": "linear", "factor": 1.7}),
    "dynamic": (4096, {"rope_type": "dynamic", "factor": 4.0}),
    "yarn of Qwen2.5": (
        32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn, every option": (
        16384,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "truncate": False,
        },
    ),
    "yarn, own attention factor": (
        16384,
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn, one mscale alone counts for nothing": (
        16384,
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.5,
            "original_max_position_embeddings": 4096,
        },
    ),
    "llama3 of Llama 3.1": (131072, LLAMA31),
    "llama3 of Llama 4": (262144, LLAMA31 | {"factor": 16.0, "high_freq_factor": 1.0}),
    "longrope": (131072, {"rope_type": "longrope", "original_max_position_embeddings": 4096}),
    "longrope, own attention factor": (
        131072,
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "attention_factor": 1.19,
            "original_max_position_embeddings": 4096,
        },
    ),
    "proportional of Gemma 4": (
        131072,
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    ),
    "proportional, stretched, an odd number of pairs": (
        131072,
        {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 8.0},
    ),
}
# below, at and beyond every original length
LENGTHS = (17, 4096, 4097, 9000, 32768, 32769, 1_048_576)


def hf_config(kind, H=64, theta=500_000.0):
    """A transformers config of `kind`, with the values that a user's config.json would have."""
    max_length, parameters = KINDS[kind]
    parameters = {**parameters, "rope_theta": theta}
    if parameters.get("rope_type") == "longrope":
        parameters |= {"short_factor": factors(H, 1), "long_factor": factors(H, 2)}
    return transformers.LlamaConfig(
        hidden_size=2 * H,
        num_attention_heads=2,
        head_dim=H,
        rope_parameters=parameters,
        max_position_embeddings=max_length,
    )


def theirs(config, length):
    """inv_freq and attention scale of transformers in one forward pass over `length` positions."""
    module = LlamaRotaryEmbedding(config)
    module(torch.zeros(1), torch.tensor([[0, length - 1]]))
    return module.inv_freq.numpy(), module.attention_scaling


@pytest.mark.parametrize(
    "theta,H", [(10_000.0, 64), (1_000_000.0, 128), (500_000.0, 80), (10_000.0, 96)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers_at_every_length(kind, theta, H):
    config = hf_config(kind, H, theta)
    spec = rope.from_hf(config.to_dict())
    # traced length, as in training
    ours = jax.jit(lambda length: rope.frequencies(spec, H, length))
    for length in LENGTHS:
        inverse, scale = theirs(config, length)
        got = ours(length)
        assert got.inverse.dtype == jnp.float32
        # One unit in the last place is up to 1.2e-7; dynamic takes a float32 power on the device.
        tolerance = 5e-7 if spec.type == "dynamic" else 2.5e-7
        np.testing.assert_allclose(got.inverse, inverse, rtol=tolerance, err_msg=f"length {length}")
        assert float(got.scale) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_known_length_gives_what_a_traced_one_gives(kind):
    spec = rope.from_hf(hf_config(kind).to_dict())
    for length in LENGTHS:
        traced = jax.jit(lambda n: rope.frequencies(spec, 64, n).inverse)(length)
        np.testing.assert_allclose(rope.frequencies(spec, 64, length).inverse, traced, rtol=3e-7)


@pytest.mark.parametrize("theta,H", [(10_000.0, 128), (1_000_000.0, 128), (10_000.0, 96)])
def test_rotation_equals_transformers_up_to_a_million_positions(theta, H):
    config = hf_config("yarn, own attention factor", H, theta)  # its scale is not 1
    rng = np.random.default_rng(0)
    positions = np.sort(rng.integers(0, 1_048_576, size=(2, 40)).astype(np.int32))
    positions[:, 0], positions[:, -1] = 0, 1_048_575
    q = rng.normal(size=(2, 40, 3, H)).astype(np.float32)

    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.from_numpy(positions))
    wanted, _ = apply_rotary_pos_emb(
        torch.from_numpy(q), torch.from_numpy(q), cos, sin, unsqueeze_dim=2
    )

    # Their own frequencies: an angle of a million radians turns one unit in their last place into
    # 0.1.
    got = rope.rotation(
        jnp.asarray(positions), rope.Frequencies(jnp.asarray(module.inv_freq.numpy()), 1.5)
    )
    assert all(part.dtype == jnp.float32 and part.shape == (2, 40, H // 2) for part in got)
    np.testing.assert_allclose(got[0], sin[..., : H // 2], atol=1e-5)
    np.testing.assert_allclose(got[1], cos[..., : H // 2], atol=1e-5)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(q), got), wanted, atol=5e-5)


def test_rotate_computes_in_float32_and_returns_the_dtype_it_got():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16), jnp.bfloat16)
    rotation = rope.rotation(jnp.arange(1000, 1005)[None], rope.frequencies(RopeSpec(), 16, 1005))
    wanted = rope.rotate(x.astype(jnp.float32), rotation)
    got = rope.rotate(x, rotation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        got.astype(jnp.float32), wanted.astype(jnp.bfloat16).astype(jnp.float32)
    )


def test_scores_depend_on_the_distance_alone():
    spec, (q, k) = RopeSpec(), jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))
    frequencies = rope.frequencies(spec, 32, 2048)

    def score(i, j):
        return jnp.sum(
            rope.rotate(q, rope.rotation(jnp.array([[i]]), frequencies))
            * rope.rotate(k, rope.rotation(jnp.array([[j]]), frequencies))
        )

    np.testing.assert_allclose(score(7, 3), score(1007, 1003), atol=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 0.01


# config.json


@pytest.mark.parametrize("kind", KINDS)
def test_legacy_config_reads_like_the_new_one(kind):
    new = hf_config(kind).to_dict()
    legacy = dict(new)
    parameters = dict(legacy.pop("rope_parameters"))
    legacy["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    legacy["rope_scaling"] = None if kind == "default" else parameters
    assert rope.from_hf(legacy) == rope.from_hf(new)


@pytest.mark.parametrize("kind", KINDS)
def test_written_config_reads_back_the_same(kind):
    spec = rope.from_hf(hf_config(kind).to_dict())
    max_length = spec.original_length if spec.type == "default" else 4 * spec.original_length
    written = json.loads(json.dumps(rope.to_hf(spec, max_length)))
    assert rope.from_hf(written) == spec


@pytest.mark.parametrize("how", ["in config.json", "over a loaded config"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_written(tmp_path, kind, how):
    """Merged into a base's config.json (export), or given to AutoConfig with the base (an adapter's
    rope.json).
    """
    spec = rope.from_hf(hf_config(kind).to_dict())
    written = json.loads(json.dumps(rope.to_hf(spec, 4 * spec.original_length)))
    length = spec.original_length
    base = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=length
    )
    base.save_pretrained(tmp_path)
    if how == "in config.json":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | written))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
    else:
        config = transformers.AutoConfig.from_pretrained(tmp_path, **written)
    for length in (17, 40_000):
        inverse, scale = theirs(config, length)
        got = rope.frequencies(spec, 64, length)
        np.testing.assert_allclose(got.inverse, inverse, rtol=5e-7)
        assert float(got.scale) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_written_config_is_what_vllm_needs(kind):
    spec = rope.from_hf(hf_config(kind).to_dict())
    length = 4 * spec.original_length
    written = rope.to_hf(spec, length)
    parameters = written["rope_parameters"]
    # vLLM: max_position_embeddings * factor for linear, dynamic and proportional, as it stands for
    # the others.
    reads = {
        "linear": spec.original_length,
        "dynamic": spec.original_length,
        "longrope": 32 * spec.original_length,
        "proportional": spec.original_length,
    }
    assert written["max_position_embeddings"] == reads.get(spec.type, length)
    assert ("original_max_position_embeddings" in parameters) == (
        spec.type in ("yarn", "llama3", "longrope")
    )
    assert spec.factor == 1 or type(parameters["factor"]) is float
    assert written["rope_theta"] == parameters["rope_theta"] == 500_000.0


def test_integer_factors_are_written_as_floats():
    spec = rope.from_hf(
        {
            "max_position_embeddings": 2048,
            "rope_scaling": {"type": "linear", "factor": 8},
            "rope_theta": 10000,
        }
    )
    assert '"factor": 8.0' in json.dumps(rope.to_hf(spec, 16384))


def test_su_is_longrope():
    scaling = {"short_factor": factors(8, 1), "long_factor": factors(8, 2)}
    config = {"max_position_embeddings": 4096, "original_max_position_embeddings": 1024}
    spec = rope.from_hf(config | {"rope_scaling": scaling | {"type": "su"}})
    assert spec == rope.from_hf(config | {"rope_scaling": scaling | {"type": "longrope"}})
    assert (spec.type, spec.factor, spec.original_length) == ("longrope", 4.0, 1024)


@pytest.mark.parametrize(
    "top,inside,wanted", [(None, 1024, 1024), (None, None, 8192), (2048, 1024, 2048)]
)
@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_original_length_is_found_where_transformers_finds_it(kind, top, inside, wanted):
    scaling = {**LLAMA31, "rope_type": kind, "original_max_position_embeddings": inside}
    config = {
        "max_position_embeddings": 8192,
        "rope_scaling": {k: v for k, v in scaling.items() if v is not None},
    }
    if top:
        config["original_max_position_embeddings"] = top
    assert rope.from_hf(config).original_length == wanted
    read = transformers.LlamaConfig(**config)
    read.standardize_rope_params()  # as every frequency function begins
    assert read.rope_parameters["original_max_position_embeddings"] == wanted


def test_the_legacy_entry_wins_over_the_new_one_as_in_transformers():
    config = {
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    }
    spec = rope.from_hf(config)
    read = transformers.LlamaConfig(**config).rope_parameters
    assert (spec.factor, spec.theta) == (read["factor"], read["rope_theta"]) == (2.0, 10_000.0)


@pytest.mark.parametrize(
    "config,named",
    [
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk' is none of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "factor is nan; it has to be a number above 0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "yarn", "factor": 10**400}}, "factor is <an integer"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": True}}, "beta_fast is True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": -1}}, "mscale is -1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "no"}},
            "truncate is 'no'; it has to be true or false",
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 0.5,
                }
            },
            "original_max_position_embeddings is 0.5",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [float("nan")],
                }
            },
            r"long_factor is \[nan\]",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": {"1": 1.0},
                    "long_factor": [1.0],
                }
            },
            "short_factor is {'1': 1.0}",
        ),
        (
            {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
            r"type is \['linear'\]; it has to be a word",
        ),
        (
            {"rope_scaling": {**LLAMA31, "high_freq_factor": 0.5}},
            "high_freq_factor=0.5 is below low_freq_factor=1.0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 1}, "rope_theta is 1; it has to be a number above 1"),
        ({"rope_theta": [1e4]}, "rope_theta"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"rope_scaling": {**LLAMA31, "low_freq_factor": None}}, "'low_freq_factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "'long_factor'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": "half",
                }
            },
            "partial_rotary",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "every layer",
        ),
    ],
)
def test_config_json_that_cannot_be_right_is_refused(config, named):
    with pytest.raises(ModelError, match=named) as refusal:
        rope.from_hf({"max_position_embeddings": 2048} | config)
    assert "\n" not in str(refusal.value)


# context.rope


def stretched(base, type, factor="auto", length=20_000, max_length=None):
    max_length = rope.reach(base, base.original_length) if max_length is None else max_length
    return rope.extend(base, type=type, factor=factor, length=length, max_length=max_length)


LINEAR = RopeSpec("linear", 10_000.0, 4.0, 2048)
LLAMA3 = RopeSpec("llama3", 500_000.0, 8.0, 8192)


@pytest.mark.parametrize("type", ["linear", "dynamic", "yarn"])
def test_auto_factor_is_the_least_whole_one_that_reaches(type):
    base = RopeSpec(theta=5e5, original_length=2048)
    assert stretched(base, type, length=16_384) == RopeSpec(type, 5e5, 8.0, 2048)
    assert stretched(base, type, length=16_385) == RopeSpec(type, 5e5, 9.0, 2048)


@pytest.mark.parametrize("base", [RopeSpec(), LINEAR, LLAMA3], ids=lambda base: base.type)
def test_auto_leaves_a_base_alone_that_reaches(base):
    assert stretched(base, "linear", length=2048) is base
    assert stretched(base, "keep", length=2048) is base
    # whether that can work is the caller's question
    assert stretched(base, "keep", length=10**6) is base


def test_a_factor_counts_from_the_original_length_and_replaces_the_scaling_of_the_base():
    assert stretched(LINEAR, "linear", length=20_000) == RopeSpec("linear", 10_000.0, 10.0, 2048)
    assert stretched(LINEAR, "yarn", length=20_000) == RopeSpec("yarn", 10_000.0, 10.0, 2048)
    assert stretched(LLAMA3, "linear", length=262_144, max_length=131_072) == RopeSpec(
        "linear", 5e5, 32.0, 8192
    )
    assert stretched(RopeSpec(), "yarn", 16) == RopeSpec("yarn", 10_000.0, 16.0, 2048)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "default"])
def test_twice_the_length_is_the_same_kind_with_twice_the_factor(kind):
    """Frequencies of transformers, of the base's own fields with the factor doubled by hand."""
    config, H = hf_config(kind), 64
    base = rope.from_hf(config.to_dict())
    reads = rope.reach(base, config.max_position_embeddings)
    factor = 2 * base.factor
    longer = stretched(base, base.type, factor, length=2 * reads, max_length=reads)
    parameters = config.rope_parameters
    parameters["factor"] = factor
    if base.type == "longrope":
        parameters["long_factor"] = [
            x ** (np.log(factor) / np.log(base.factor)) for x in parameters["long_factor"]
        ]
    for length in (4097, 32_769, 2 * reads):
        inverse, scale = theirs(config, length)
        got = rope.frequencies(longer, H, length)
        np.testing.assert_allclose(got.inverse, inverse, rtol=1e-6)
        assert float(got.scale) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    "base,type,factor,named",
    [
        (
            RopeSpec(),
            "ntk",
            "auto",
            "context.rope.type='ntk' is none of keep, linear, dynamic, yarn, llama3, longrope",
        ),
        (
            RopeSpec(),
            "llama3",
            "auto",
            "a base with llama3 frequencies, and .* 'default': use linear or dynamic or yarn",
        ),
        (
            LLAMA3,
            "longrope",
            "auto",
            "extends a base with longrope frequencies.*'llama3': use linear or yarn",
        ),
        (
            RopeSpec("proportional", partial=0.25),
            "yarn",
            "auto",
            "'yarn' cannot extend every base, and this base has 'proportional': use proportional",
        ),
        (
            RopeSpec(),
            "proportional",
            "auto",
            "extends a base with proportional frequencies, and .* 'default': use linear",
        ),
        (RopeSpec("longrope", factor=1.0), "longrope", 16.0, "factor of the base is 1.0"),
        (RopeSpec(), "linear", 10**400, "context.rope.factor=<an integer"),
        (RopeSpec(), "linear", 0.5, "context.rope.factor=0.5"),
        (RopeSpec(), "linear", float("nan"), "context.rope.factor=nan"),
        (RopeSpec(), "linear", float("inf"), "context.rope.factor=inf"),
        (RopeSpec(), "linear", "4", "context.rope.factor='4'"),
        (
            RopeSpec(),
            "linear",
            9.0,
            "9.0 stretches 2048 tokens to 18432.*context.length=20000.* 10",
        ),
        (LINEAR, "dynamic", "auto", "type='dynamic' extends.*'linear': use linear or yarn"),
    ],
)
def test_what_cannot_be_asked_of_context_rope(base, type, factor, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        stretched(base, type, factor)
    assert "\n" not in str(refusal.value)


def test_an_unknown_type_is_refused_even_where_nothing_needs_stretching():
    with pytest.raises(ConfigError, match="'linaer' is none of"):
        stretched(RopeSpec(), "linaer", length=1024)


@pytest.mark.parametrize(
    "spec,max_position_embeddings,tokens",
    [
        (RopeSpec(), 2048, 2048),
        (LINEAR, 2048, 8192),
        (RopeSpec("dynamic", 1e4, 2.5, 2048), 2048, 5120),
        (LLAMA3, 131_072, 131_072),
        (RopeSpec("yarn", 1e6, 4.0, 32_768), 131_072, 131_072),
        # Qwen2.5's model card: rope_scaling added, length left
        (RopeSpec("yarn", 1e6, 4.0, 32_768), 32_768, 131_072),
    ],
)
def test_reach(spec, max_position_embeddings, tokens):
    assert rope.reach(spec, max_position_embeddings) == tokens


def test_a_kind_is_one_row(monkeypatch):
    toy = rope_kinds.Kind(
        rope.KINDS["linear"].frequencies,
        required=("factor",),
        written=("factor",),
        vllm_multiplies=True,
        extends=("toy",),
    )
    monkeypatch.setitem(rope.KINDS, "toy", toy)
    spec = RopeSpec("toy", factor=4.0)
    entries = rope.to_hf(spec, 8192)
    assert entries["max_position_embeddings"] == spec.original_length
    assert rope.from_hf(entries) == spec
    assert rope.reach(spec, 2048) == 8192
    stretched = rope.extend(spec, type="linear", factor="auto", length=16384, max_length=8192)
    assert (stretched.type, stretched.factor) == ("linear", 8.0)
    with pytest.raises(ConfigError, match="base has 'toy': use linear or yarn"):
        rope.extend(spec, type="dynamic", factor="auto", length=16384, max_length=8192)
