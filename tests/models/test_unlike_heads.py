"""Models whose layers differ in the number and the size of their heads: documents stay apart, tiles
and devices change nothing, and every reader counts the heads of each layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.attention.pattern import FULL, AttentionPattern
from lljax.build import stretched
from lljax.errors import ConfigError, ModelError
from lljax.models import lora
from lljax.models.cache import cache_bytes
from lljax.models.decoder import Decoder
from lljax.models.families import rope_to_hf, spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.memory import EVERYTHING, Memory
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import layout_of

V = 61
HF = {
    "model_type": "gemma4_text",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
MODELS = {"dense": HF, "experts": HF | EXPERTS}
SHIFTED = AttentionPattern("shifted", group=32)
slow = pytest.mark.slow


@functools.cache
def model_of(name):
    model = Decoder(spec_from_hf(MODELS[name]))
    lora.attach(model, rank=2, alpha=4, targets=(r"self_attn\..*", r"mlp\..*"))
    initialize(model, 0, deviation=0.3)
    for layer in model.layers:  # away from 1
        layer.scale.set_value(layer.scale[...] * 0.7)
    return model


def row(T):
    return jnp.asarray(np.random.default_rng(0).integers(0, V, (2, T)), jnp.int32)


def packed(T):
    """Documents whose borders fall on no border of a device or tile, and padding."""
    first = np.repeat([1, 2, 3], (T // 3 + 1, T // 6 + 2, T - T // 3 - T // 6 - 3))
    second = np.repeat([1, 2, 0], (T - 14, 5, 9))
    return jnp.asarray(np.stack([first, second]), jnp.int32)


def positions_of(segments):
    """0, 1, 2, ... in every document."""
    ids = np.asarray(segments)
    starts = np.diff(ids, prepend=-1, axis=1) != 0
    places = np.arange(ids.shape[1])
    return jnp.asarray(places - np.maximum.accumulate(starts * places, axis=1), jnp.int32)


@functools.partial(
    jax.jit,
    static_argnums=(0, 4, 5, 6),
    compiler_options={"xla_backend_optimization_level": 0},  # the time goes to compiling
)
def run(graphdef, state, tokens, both, pattern, memory, layout):
    segments, positions = both

    def loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model(
            tokens,
            positions=positions,
            segments=segments,
            pattern=pattern,
            memory=memory,
            layout=layout,
        )
        logits = model.logits(hidden) * (segments > 0)[..., None]
        return jnp.mean(jnp.square(logits)), logits

    return jax.value_and_grad(loss, has_aux=True)(state)


def result(name, T, pattern=FULL, memory=EVERYTHING, layout=None):
    graphdef, state = nnx.split(model_of(name))
    both = packed(T), positions_of(packed(T))
    return run(graphdef, state, row(T), both, pattern, memory, layout)


def assert_same(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(x - y) <= 2e-4 * max(np.linalg.norm(y), 1e-3), x.shape


def test_a_document_does_not_read_another_and_no_token_reads_the_future():
    T = 80
    graphdef, state = nnx.split(model_of("dense"))
    both = packed(T), positions_of(packed(T))
    (_, logits), _ = run(graphdef, state, row(T), both, FULL, EVERYTHING, None)
    for place in (5, 30, 60):
        changed = row(T).at[:, place].set((row(T)[:, place] + 1) % V)
        (_, other), _ = run(graphdef, state, changed, both, FULL, EVERYTHING, None)
        apart = np.abs(np.asarray(logits - other)).max(-1) > 1e-6
        same = np.asarray((both[0] == both[0][:, place : place + 1]) & (both[0] > 0))
        assert not (apart & ~(same & (np.arange(T) >= place))).any()
        assert (apart == same)[:, place : place + 3].all()


@pytest.mark.slow
@pytest.mark.parametrize("name,pattern,tile", [("dense", SHIFTED, 24), ("experts", FULL, 16)])
def test_tiles_change_nothing(name, pattern, tile):
    whole = result(name, 96, pattern)
    assert_same(result(name, 96, pattern, Memory("full", tile=tile)), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,mesh,mode,pattern,tile",
    [
        ("dense", {"sequence": 2}, "halo", SHIFTED, 24),
        ("dense", {"sequence": 2}, "allgather", FULL, 0),
        pytest.param("dense", {"sequence": 2}, "ulysses", FULL, 0, marks=slow),
        pytest.param("dense", {"sequence": 4}, "ulysses", FULL, 0, marks=slow),
        pytest.param("dense", {"sequence": 4}, "ring", FULL, 16, marks=slow),
        pytest.param("dense", {"sequence": 2, "tensor": 2}, "auto", FULL, 0, marks=slow),
        pytest.param("experts", {"sequence": 2}, "halo", SHIFTED, 24, marks=slow),
        pytest.param("experts", {"sequence": 2, "expert": 2}, "auto", FULL, 0, marks=slow),
    ],
)
def test_devices_change_nothing(name, mesh, mode, pattern, tile):
    T = 128
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout, _ = layout_of(
        make_mesh(**mesh, data=1, devices=devices), mode, pattern, T, model_of(name).spec
    )
    memory = Memory("full", tile=tile)
    assert_same(result(name, T, pattern, memory, layout), result(name, T, pattern))


def test_heads_that_do_not_spread_are_refused():
    mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
    with pytest.raises(ConfigError, match="the 4 query and 2 and 4 key/value heads.*use 2"):
        layout_of(mesh, "auto", FULL, 64, spec_from_hf(HF))


def test_cache_and_flops_count_the_heads_of_each_layer():
    model = model_of("dense")
    local, wide = 2 * 4 * 8, 2 * 2 * 16  # keys and values of a token
    assert cache_bytes(model.spec, 100, jnp.float32) == 100 * 4 * (2 * local + 2 * wide)
    inside, over = model.row_flops(96, FULL)[::2]  # stack by stack
    pairs = 96 * 97 / 2
    assert over.forward == 2 * 4 * pairs * (16 + 16)
    assert inside.forward == 2 * 4 * (20 * 21 / 2 + 76 * 20) * (8 + 8)
    assert model.spec.key_size == 32 and model.spec.kv_parts == 2


def test_the_factor_of_a_layer_never_trains():
    model = Decoder(spec_from_hf(HF))
    lora.mark_trainable(model)
    trainable = {layer.scale.get_metadata("trainable") for layer in model.layers}
    assert trainable == {False} and model.norm.weight.get_metadata("trainable")


def test_only_its_own_kind_stretches_a_proportional_rope():
    spec = spec_from_hf(HF)
    longer = stretched(spec, type="proportional", factor="auto", length=250)
    assert (longer.rope.factor, longer.max_length) == (4.0, 250)
    assert longer.more_ropes == spec.more_ropes
    entries = rope_to_hf(longer)
    assert entries["rope_parameters"]["full_attention"]["factor"] == 4.0
    again = spec_from_hf(HF | entries)
    assert again.rope == longer.rope and again.max_length == 256
    for kind in ("linear", "yarn", "dynamic", "llama3"):
        with pytest.raises(ConfigError, match=f"{kind}.*'proportional': use proportional"):
            stretched(spec, type=kind, factor="auto", length=250)


@pytest.mark.parametrize(
    "fields,named",
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256.*of Gemma 4"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2.*share keys and values"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp=True.*wider MLP"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is not supported"),
        ({"num_global_key_value_heads": 3}, "num_attention_heads=4.*num_key_value_heads=3"),
        ({"global_head_dim": 15}, "head_dim=15 is odd"),
        ({"layer_types": ["sliding_attention"] * 4}, r"layer_types\[3\] is 'sliding.*no window"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config has to give the global"),
        ({"per_layer_config": {"1": {"head_dim": 4}}}, "per_layer_config has to give the global"),
        (
            {"per_layer_config": {"1": {"head_dim": "4"}, "3": {"head_dim": "4"}}},
            "head_dim is '4'",
        ),
        (
            {"per_layer_config": {"1": {"num_experts": 4}, "3": {"num_experts": 4}}},
            "no other override",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "rope_type 'yarn' of a gemma4_text model is not supported",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "an object for each of full_attention"),
        (EXPERTS | {"top_k_experts": 9}, "num_experts_per_tok=9 exceeds the 4 experts"),
        (EXPERTS | {"num_experts": None}, "num_experts is None"),
    ],
)
def test_what_is_not_read_is_named(fields, named):
    with pytest.raises(ModelError, match=named) as refusal:
        spec_from_hf(HF | fields)
    assert "\n" not in str(refusal.value)


def test_both_forms_of_config_json_give_the_same_heads():
    """As the hub has it, and as transformers saves it."""
    overrides = {"head_dim": 16, "num_key_value_heads": 2}
    saved = {name: value for name, value in HF.items() if "global" not in name}
    saved["per_layer_config"] = {"01": overrides, "3": overrides}
    assert spec_from_hf(saved) == spec_from_hf(HF)
    shared = spec_from_hf(HF | {"attention_k_eq_v": False}).layers[1].heads
    assert (shared.K, shared.H, shared.keys_are_values) == (4, 16, False)
