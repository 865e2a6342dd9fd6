"""DecoderSpec against transformers' config classes: defaults, biases, windows, and what is
refused.
"""

import functools
import json

import families
import pytest
import torch
import transformers

from lljax.build import stretched
from lljax.errors import ModelError
from lljax.interop.huggingface import hf_names, hf_shape
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, spec_from_hf

# A config.json of these says how many experts there are, how wide its latents are, or that layers
# have no embeddings.
WITH_EXPERTS = {
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    # by default RoPE would turn 21
    "glm4_moe": functools.partial(transformers.Glm4MoeConfig, head_dim=128),
    "deepseek_v3": transformers.DeepseekV3Config,
    "llama4_text": transformers.Llama4TextConfig,
    "gpt_oss": transformers.GptOssConfig,
    "dots1": functools.partial(
        transformers.Dots1Config, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2
    ),
    "solar_open": functools.partial(transformers.SolarOpenConfig, intermediate_size=10_240),
    "glm4_moe_lite": transformers.Glm4MoeLiteConfig,
    "youtu": transformers.YoutuConfig,
    "qwen3_next": transformers.Qwen3NextConfig,
    "gemma4_text": functools.partial(
        transformers.Gemma4TextConfig,
        hidden_size_per_layer_input=0,
        allow_global_per_layer_attribute_access=True,
    ),
    "qwen3_5_moe_text": transformers.Qwen3_5MoeTextConfig,
    "granitemoehybrid": functools.partial(
        transformers.GraniteMoeHybridConfig,
        num_local_experts=0,
        layer_types=["full_attention"] * 32,
        time_step_limit=None,  # infinity does not go through JSON
    ),
}
CONFIGS = {
    family: config
    for family, (config, _) in families.FAMILIES.items()
    if family in FAMILIES and family not in WITH_EXPERTS
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
NEEDED = list(SIZES)


def theirs(family, **fields):
    """What transformers makes of a config.json with `fields`, in our terms."""
    c = (CONFIGS | WITH_EXPERTS)[family](**fields)
    L, window = (
        c.num_hidden_layers,
        getattr(c, "sliding_window", None) or getattr(c, "attention_chunk_size", None),
    )
    types = (
        getattr(c, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * L
    )
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "N": c.num_attention_heads,
        "K": c.num_key_value_heads,
        "H": getattr(c, "qk_head_dim", None)
        or getattr(c, "head_dim", None)
        or c.hidden_size // c.num_attention_heads,
        "F": getattr(c, "intermediate_size_mlp", None)
        or getattr(c, "shared_intermediate_size", None)
        or getattr(c, "intermediate_size", None)
        or c.moe_intermediate_size,
        "L": L,
        "norm_eps": c.rms_norm_eps,
        "tied": c.tie_word_embeddings,
        "max_length": c.max_position_embeddings,
        "windows": tuple(None if kind == "full_attention" else window for kind in types),
    }


def assert_equal(family, fields):
    ours, wanted = spec_from_hf({"model_type": family} | fields), theirs(family, **fields)
    windows = wanted.pop("windows")
    assert {name: getattr(ours, name) for name in wanted} == wanted
    assert tuple(layer.window for layer in ours.layers) == windows
    parameters = (CONFIGS | WITH_EXPERTS)[family](**fields).rope_parameters
    kinds = (
        [parameters[kind] for kind in ("full_attention", "sliding_attention")]
        if ours.more_ropes
        else [parameters]
    )
    assert [(r.type, r.theta) for r in ours.ropes] == [
        (kind["rope_type"], kind["rope_theta"]) for kind in kinds
    ]


def test_every_family_is_tested():
    assert set(CONFIGS | WITH_EXPERTS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS | WITH_EXPERTS)
def test_default_config_in_full(family):
    full = json.loads((CONFIGS | WITH_EXPERTS)[family]().to_json_string(use_diff=False))
    assert_equal(family, {name: value for name, value in full.items() if name != "model_type"})


@pytest.mark.parametrize("family", CONFIGS)
def test_absent_fields_take_the_defaults_of_transformers(family):
    # qwen: 32 K/V heads where none are named
    sizes = SIZES | {"num_attention_heads": 32, "hidden_size": 2048}
    assert_equal(family, sizes)


CASES = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    ("llama", {"rms_norm_eps": 1e-5, "head_dim": None}),
    ("mistral", {"num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    ("mistral", {"num_key_value_heads": 3, "sliding_window": 20, "head_dim": 12}),
    (
        "ministral",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    ("smollm3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("cwm", {"num_key_value_heads": 2, "sliding_window": 20, "num_hidden_layers": 9}),
    ("ernie4_5", {"use_bias": True}),
    ("seed_oss", {"num_key_value_heads": 2, "pad_token_id": 0, "attention_out_bias": True}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 6, "sliding_window": 20}),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True}),
    (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
        },
    ),
    (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": None,
            "max_window_layers": 0,
        },
    ),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 6, "head_dim": 16}),
    ("qwen3", {"num_key_value_heads": 2, "attention_bias": True}),
    (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 2,
        },
    ),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
    ("gemma2", {"num_key_value_heads": 3, "sliding_window": 20}),
    (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "sliding_window": 20,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 5,
        },
    ),
    (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default"},
            },
        },
    ),
    ("phi3", {"pad_token_id": 0}),
    ("phi3", {"num_key_value_heads": 2, "sliding_window": 20, "pad_token_id": 0}),
    ("internlm3", {}),
    (
        "internlm3",
        {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True, "head_dim": None},
    ),
]
NAMED = [
    pytest.param(family, fields, id=f"{family} {', '.join(fields)}") for family, fields in CASES
]


@pytest.mark.parametrize("family,fields", NAMED)
def test_spec_equals_transformers(family, fields):
    assert_equal(family, SIZES | fields)


@pytest.mark.parametrize("family,fields", NAMED)
def test_parameters_have_the_names_and_shapes_of_transformers(family, fields):
    """Biases, q/k norms, head sizes and tying, as the torch model has them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**(SIZES | fields)))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = Decoder(spec_from_hf({"model_type": family} | SIZES | fields))
    assert {
        name: hf_shape(variable) for _, variable in declared(ours) for name in hf_names(variable)
    } == wanted


def test_spec_is_hashable():
    scaling = {
        "type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 512,
    }
    specs = [
        spec_from_hf({"model_type": "llama", **SIZES, "rope_scaling": scaling}) for _ in range(2)
    ]
    assert hash(specs[0]) == hash(specs[1]) and specs[0] == specs[1]


@pytest.mark.parametrize(
    "scaling,tokens",
    [
        (None, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"type": "dynamic", "factor": 4.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
    ],
)
def test_max_length_is_what_the_model_reads_not_what_it_was_trained_for(scaling, tokens):
    spec = spec_from_hf(
        {"model_type": "llama", **SIZES, "max_position_embeddings": 2048, "rope_scaling": scaling}
    )
    assert spec.max_length == tokens


MOE = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


LLAMA4 = {
    "model_type": "llama4_text",
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}


def test_layer_types_of_a_mistral_are_those_of_a_ministral():
    """As transformers' AutoConfig takes it."""
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    fields = SIZES | {"num_key_value_heads": 2, "sliding_window": 20, "layer_types": types}
    mistral, ministral = (
        spec_from_hf(fields | {"model_type": name}) for name in ("mistral", "ministral")
    )
    assert mistral.layers == ministral.layers
    assert [layer.window for layer in mistral.layers] == [None, 20, 20]


@pytest.mark.parametrize("fields", [{"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 0]}])
def test_the_layers_without_rope_of_smollm3_are_those_of_transformers(fields):
    fields = SIZES | fields | {"num_key_value_heads": 2}
    ours = spec_from_hf(fields | {"model_type": "smollm3"})
    theirs = transformers.SmolLM3Config(**fields).no_rope_layers
    assert [layer.rope is not None for layer in ours.layers] == [bool(x) for x in theirs]


def test_the_windows_of_qwen2_moe_are_those_of_transformers():
    """In every second layer below `max_window_layers`, unlike Qwen2's."""
    fields = SIZES | {
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 4,
    }
    ours, types = (
        spec_from_hf(fields | {"model_type": "qwen2_moe"}),
        transformers.Qwen2MoeConfig(**fields).layer_types,
    )
    assert [layer.window for layer in ours.layers] == [
        None if kind == "full_attention" else 20 for kind in types
    ]


GRANITE4 = {
    "model_type": "granitemoehybrid",
    "layer_types": ["attention", "mamba", "attention"],
    "num_local_experts": 0,
}
MISTRAL4 = {
    "model_type": "mistral4",
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
YARN4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ERNIE = {"model_type": "ernie4_5_moe", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2},
        {"no_rope_layers": [0, 1, 1], "moe_layers": [0]},
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
    ],
    ids=str,
)
def test_the_layers_of_llama4_are_those_of_transformers(fields):
    fields = SIZES | LLAMA4 | fields
    ours, theirs = spec_from_hf(fields), transformers.Llama4TextConfig(**fields)
    for i, layer in enumerate(ours.layers):
        assert (layer.rope is not None, layer.chunked, layer.moe) == (
            bool(theirs.no_rope_layers[i]),
            theirs.layer_types[i] == "chunked_attention",
            i in theirs.moe_layers,
        )


def test_a_rope_that_turns_chunks_alone_is_stretched_only_where_a_factor_is_named():
    spec = spec_from_hf(SIZES | LLAMA4)
    longer = stretched(spec, type="linear", factor="auto", length=1_000_000)
    assert (longer.rope, longer.max_length) == (spec.rope, 1_000_000)
    assert stretched(spec, type="linear", factor=8.0, length=1_000_000).rope.factor == 8
    everywhere = spec_from_hf(SIZES | LLAMA4 | {"layer_types": ["full_attention"] * 3})
    assert stretched(everywhere, type="linear", factor="auto", length=1_000_000).rope.factor == 8


@pytest.mark.parametrize(
    "fields,named",
    [
        ({"model_type": "gemma"}, "'gemma'.*llama, .*mistral, .*qwen2, .*qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*silu"),
        (
            {"model_type": "gemma2", "num_key_value_heads": 2, "hidden_activation": "silu"},
            "hidden_act 'silu'.*gelu_pytorch_tanh",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 2, "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            {
                "model_type": "gemma3_text",
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default"},
            },
            "full_attention",
        ),
        (
            {"model_type": "gemma2", "num_key_value_heads": 2, "query_pre_attn_scalar": 0},
            "query_pre_attn_scalar is 0",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 2, "sliding_window_pattern": 0},
            "sliding_window_pattern is 0",
        ),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 rotates 3 of head_dim=8"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it has to be a share"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6.*num_key_value_heads=4"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_size": 42}, "head_dim=7 is odd"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
            "short_factor has 1 .* 4",
        ),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 2,
            },
            "layer_types has 2 entries for num_hidden_layers=3",
        ),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "layer_types": ["chunked_attention"] * 3,
            },
            "layer_types.*'chunked_attention'",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types\[1\] is 'sliding_attention'.*'llama' no window",
        ),
        (
            {
                "model_type": "mixtral",
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 20,
                "layer_types": ["full_attention"] * 3,
            },
            r"layer_types\[0\] is 'full_attention'.*a window of 20",
        ),
        (
            {
                "model_type": "glm4_moe_lite",
                "mlp_layer_types": ["dense", "sparse", "moe"],
            },
            r"mlp_layer_types\[2\] 'moe' is none of dense, sparse",
        ),
        ({"model_type": "iquestcoder", "clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"hidden_act": {"silu": 1}}, "hidden_act {'silu': 1}"),
        ({"hidden_act": ["silu"] * 1000}, r"hidden_act \['silu'.{,200}is not"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 10**4000}, "vocab_size is <an integer of .{,20}>; it has to be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it has to be a number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"initializer_range": [0.02]}, "initializer_range"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings is 'false'; it has to be true or false",
        ),
        ({"attention_bias": []}, r"attention_bias is \[\]"),
        ({"dtype": {"a": 1}}, "dtype is {'a': 1}"),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0},
            "sliding_window is 0",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": -5},
            "sliding_window is -5",
        ),
        ({"model_type": "phi3", "sliding_window": 2.5}, "sliding_window is 2.5"),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "max_window_layers": "all",
            },
            "max_window_layers is 'all'",
        ),
        (
            {
                "model_type": "gemma2",
                "num_key_value_heads": 2,
                "final_logit_softcapping": float("nan"),
            },
            "final_logit_softcapping is nan",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 2, "rope_scaling": [4]},
            r"rope_scaling is \[4\]",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 2, "rope_local_base_freq": 0},
            "rope_local_base_freq is 0",
        ),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (MOE | {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        (LLAMA4 | {"attn_scale": float("nan")}, "attn_scale is nan"),
        (LLAMA4 | {"moe_layers": ["all"]}, "moe_layers"),
        (MOE | {"num_experts": None}, "num_experts is None"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds the 8 experts"),
        (
            MOE | {"model_type": "glm4_moe", "n_routed_experts": 8, "n_group": 3, "topk_group": 1},
            "n_group=3 and topk_group=1.* 8 experts",
        ),
        (LLAMA4 | {"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        (
            LLAMA4 | {"layer_types": ["sliding_attention"] * 3},
            "'sliding_attention' is none of full_attention, chunked_attention",
        ),
        (
            LLAMA4 | {"no_rope_layers": [1, 0]},
            "no_rope_layers has 2 entries for num_hidden_layers=3",
        ),
        (GRANITE4, r"layer_types\[1\] 'mamba' is not supported"),
        (GRANITE4 | {"layer_types": None}, r"layers_block_type\[0\] 'mamba'"),
        (
            GRANITE4 | {"layer_types": ["attention"] * 3, "num_local_experts": 4},
            "num_local_experts=4 is not supported",
        ),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0"),
        (
            MISTRAL4 | {"rope_parameters": YARN4 | {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor=0.25 and qk_rope_head_dim=8 differ; it has to be 0.4",
        ),
        (
            MISTRAL4 | {"rope_parameters": YARN4 | {"llama_4_scaling_beta": -1}},
            "llama_4_scaling_beta is -1",
        ),
        (
            {"model_type": "exaone4", "num_key_value_heads": 2, "sliding_window_pattern": "LLLG"},
            "sliding_window_pattern is 'LLLG'",
        ),
        ({"model_type": "olmo3", "rope_parameters": {"rope_type": "yarn"}}, "full_attention"),
        (ERNIE | {"use_bias": True}, "use_bias=true is not supported"),
        (ERNIE | {"moe_norm_min": 0.5}, "moe_norm_min is 0.5"),
        *[({name: None}, name) for name in NEEDED],
    ],
)
def test_config_json_that_cannot_be_right_is_refused(fields, named):
    with pytest.raises(ModelError, match=named) as refusal:
        spec_from_hf({"model_type": "llama", **SIZES, **fields})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", NEEDED)
def test_an_absent_size_is_refused_by_name(name):
    with pytest.raises(ModelError, match=name):
        spec_from_hf({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != name}})
