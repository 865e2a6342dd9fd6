import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.errors import ConfigError
from lljax.models import lora, patterns
from lljax.models.declare import LoraWeight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.lora_layers import column_norms

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def attached(**arguments):
    model = Decoder(spec_from_hf(CONFIG | {"tie_word_embeddings": arguments.pop("tied", True)}))
    lora.attach(model, **({"rank": 4, "alpha": 8.0, "targets": ("q_proj",)} | arguments))
    return model


def build(**arguments):
    model = attached(**arguments)
    initialize(model, 0, deviation=0.2)
    return model


def adapted(model):
    return [name for name, linear in lora.linear_layers(model) if linear.lora is not None]


def run(model, dropout_key=None):
    return _run(*nnx.split(model), dropout_key)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, dropout_key):
    tokens = jnp.arange(20)[None] % 50
    return nnx.merge(graphdef, state)(
        tokens, positions=jnp.arange(20)[None], dropout_key=dropout_key
    )


def randomise(model):
    for _, variable in declared(model):
        if isinstance(variable, LoraWeight):
            variable.set_value(
                jax.random.normal(jax.random.key(1), variable.get_value().shape) * 0.1
            )


@pytest.mark.parametrize(
    "targets,names",
    [
        (("q_proj", "down_proj"), ["mlp.down_proj", "self_attn.q_proj"]),
        ((r"self_attn\.[qv]_proj",), ["self_attn.q_proj", "self_attn.v_proj"]),
        ((r".*layers\.\d+\.mlp\.(up|gate)_proj",), ["mlp.gate_proj", "mlp.up_proj"]),
    ],
)
def test_targets_are_short_names_or_regular_expressions(targets, names):
    assert sorted(adapted(attached(targets=targets))) == names


def test_all_linear_adapts_every_linear_layer():
    assert len(adapted(attached(targets=("all-linear",)))) == 7


def test_a_target_that_matches_nothing_is_refused_with_the_candidates():
    with pytest.raises(
        ConfigError, match=r"'q_porj' matches no linear layer; there are .*self_attn.q_proj"
    ):
        build(targets=("q_proj", "q_porj"))


@pytest.mark.parametrize(
    "targets,line",
    [
        (("*_proj",), r"'\*_proj' is no regular expression \(nothing to repeat"),
        ((1,), "1 is no name and no regular expression"),
        (("q_(proj",), "is no regular expression"),
        (("(" * 5000,), "is no regular expression"),
        (
            ("model.layers.0.self_attn.q_proj",),
            "layers.0.self_attn.q_proj is matched and model.layers.1.self_attn.q_proj is not",
        ),
        (
            (r".*layers\.[01]\.self_attn\.q_proj",),
            "layers.2.self_attn.q_proj is not, and layers are adapted all or none",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused(targets, line):
    with pytest.raises(ConfigError, match="lora.targets: .*" + line) as refusal:
        attached(targets=targets)
    assert len(str(refusal.value)) < 300


def test_layers_that_are_named_one_by_one_are_adapted():
    assert adapted(attached(targets=tuple(f"layers.{i}.self_attn.q_proj" for i in range(3)))) == [
        "self_attn.q_proj"
    ]


@pytest.mark.parametrize(
    "arguments",
    [{"targets": ("v_proj", r"([a-z_.0-9]+)+!")}, {"rank_pattern": ((r"(.*)*!", 2),)}],
    ids=str,
)
def test_a_regular_expression_without_end_is_refused_in_time(arguments, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(
        ConfigError, match="is not done with the names of the layers in 0.5 seconds"
    ):
        attached(**arguments)


def test_patterns_give_single_modules_their_rank_and_alpha():
    model = build(
        targets=("q_proj", "up_proj", "down_proj"),
        rank_pattern=((r"mlp\..*", 6), ("up_proj", 2)),
        alpha_pattern=(("self_attn.q_proj", 3),),
    )
    found = {
        name: (
            linear.lora.rank,
            linear.lora.alpha,
            linear.lora.a[...].shape[-1],
            linear.lora.b[...].shape[-2],
        )
        for name, linear in lora.linear_layers(model)
        if linear.lora is not None
    }
    assert found == {
        "self_attn.q_proj": (4, 3.0, 4, 4),
        "mlp.up_proj": (6, 8.0, 6, 6),
        "mlp.down_proj": (6, 8.0, 6, 6),
    }


@pytest.mark.parametrize(
    "pattern,line",
    [
        ("v_proj", "'v_proj' matches no adapted layer; there are self_attn.q_proj"),
        (
            r"layers\.0\..*",
            r"matches model.layers.0.self_attn.q_proj and not model.layers.1.self_attn.q_proj",
        ),
        ("q_(proj", "is no regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(pattern, line):
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match=field + r".*" + line.replace("(", r"\(")):
            build(**{field: ((pattern, 2),)})


def test_a_tied_model_has_no_head_to_train():
    with pytest.raises(ConfigError, match="name 'embed' instead"):
        build(also_train=("head",))


def test_a_new_adapter_changes_nothing():
    plain = Decoder(spec_from_hf(CONFIG))
    initialize(plain, 0, deviation=0.2)
    np.testing.assert_array_equal(run(build()), run(plain))


@pytest.mark.parametrize("rslora,scale", [(False, 2.0), (True, 4.0)])
def test_the_update_is_scale_times_a_times_b(rslora, scale):
    model = build(rslora=rslora, targets=("all-linear",))
    randomise(model)
    merged = Decoder(spec_from_hf(CONFIG))
    initialize(merged, 0, deviation=0.2)
    for (_, ours), (_, theirs) in zip(
        lora.linear_layers(model), lora.linear_layers(merged), strict=True
    ):
        theirs.kernel.set_value(ours.kernel[...] + scale * ours.lora.a[...] @ ours.lora.b[...])
    np.testing.assert_allclose(run(model), run(merged), atol=1e-4)


def test_dropout_needs_a_key_and_differs_by_layer_and_module():
    model = build(dropout=0.5, targets=("q_proj", "k_proj"))
    randomise(model)
    key = jax.random.key(0)
    np.testing.assert_array_equal(run(model), run(model))
    assert np.any(run(model, dropout_key=key) != run(model))
    np.testing.assert_array_equal(run(model, dropout_key=key), run(model, dropout_key=key))
    salts = {linear.lora.salt for _, linear in lora.linear_layers(model) if linear.lora is not None}
    assert len(salts) == 2


def test_dora_starts_as_the_base_with_dropout_too():
    linear = build(dora=True, dropout=0.5).layers[0].self_attn.q_proj
    x, key = jax.random.normal(jax.random.key(1), (2, 5, 24)), jax.random.key(0)
    kernel, a, b = linear.kernel[0], linear.lora.a[0], linear.lora.b[0]
    graphdef, state = nnx.split(linear)
    layer = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], state))
    np.testing.assert_allclose(layer(x), x @ kernel, atol=1e-5)
    np.testing.assert_allclose(layer(x, key), x @ kernel, atol=1e-5)
    layer.lora.b.set_value(b + 0.1)
    assert np.any(layer(x, key) != layer(x))
    wanted = kernel + 2.0 * a @ (b + 0.1)
    wanted *= np.linalg.norm(kernel, axis=0) / np.linalg.norm(wanted, axis=0)
    np.testing.assert_allclose(layer(x), x @ wanted, atol=1e-4)


def test_column_norms_are_those_of_the_adapted_kernel():
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, a, b = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((3, 2, 40, 30), (3, 2, 40, 4), (3, 2, 4, 30)), strict=True)
    )
    wanted = np.linalg.norm(kernel + 0.7 * a @ b, axis=-2)
    np.testing.assert_allclose(column_norms(kernel, a, b, 0.7), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"targets": ("embed_tokens",)}, "the head of this model is its embedding"),
        (
            {"targets": ("q_proj", "lm_head"), "tied": False, "also_train": ("head",)},
            "both train the same table",
        ),
        (
            {"targets": ("embed_tokens",), "tied": False, "dora": True},
            "takes plain LoRA.*dora=True",
        ),
        (
            {"targets": ("lm_head",), "tied": False, "init": "pissa"},
            "takes plain LoRA.*init='pissa'",
        ),
        (
            {"rank": 25, "init": "olora"},
            r"lora.rank=25 and lora.init='olora'.*no more than 24 directions",
        ),
    ],
)
def test_what_cannot_be_adapted_so_is_refused(fields, line):
    with pytest.raises(ConfigError, match=line):
        build(**fields)


def test_all_linear_leaves_the_tables_alone():
    model = build(tied=False, targets=("all-linear",))
    assert model.embed_lora is None and model.head_lora is None


def test_only_factors_and_named_roles_are_trainable():
    model = build(also_train=("embed", "norm"), targets=("q_proj", "v_proj"), dora=True)
    _, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

    def roles(state):
        return {
            v.get_metadata("role")
            for v in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        }

    assert roles(trainable) == {"lora_a", "lora_b", "lora_magnitude", "embed", "norm"} and roles(
        frozen
    ) == {"kernel"}


@pytest.mark.parametrize(
    "target", ["qkv_proj", tuple(f"model.layers.{i}.self_attn.qkv_proj" for i in range(3))]
)
def test_the_name_of_a_fused_tensor_reaches_all_its_layers(target):
    model = Decoder(spec_from_hf(CONFIG | {"model_type": "phi3"}))
    targets = (target,) if isinstance(target, str) else target
    lora.attach(model, rank=2, alpha=4.0, targets=targets)
    assert adapted(model) == [f"self_attn.{name}" for name in ("k_proj", "q_proj", "v_proj")]
