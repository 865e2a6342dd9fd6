"""Models with gated delta networks: documents stay apart, tiles and devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from planning.test_flops import products

from lljax.attention.pattern import FULL, AttentionPattern
from lljax.errors import ConfigError, ModelError
from lljax.models import lora
from lljax.models.cache import cache_bytes, empty_cache, grow, take_rows
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.memory import EVERYTHING, Memory
from lljax.models.mixers.delta_rule import CHUNK, DeltaCarry, DeltaInputs, delta_rule
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import layout_of

V = 61
HF = {
    "model_type": "qwen3_5_text",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "model_type": "qwen3_5_moe_text",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 12,
}
MODELS = {"dense": HF, "experts": HF | EXPERTS}


@functools.cache
def model_of(name):
    model = Decoder(spec_from_hf(MODELS[name]))
    lora.attach(model, rank=2, alpha=4, targets=(r"linear_attn\..*", "q_proj", "o_proj"))
    initialize(model, 0, deviation=0.3)
    return model


def row(T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (2, T)), jnp.int32)


def packed(T):
    """Documents whose borders fall on no border of a device or tile, and padding."""
    cut = (T // 3 + 1, T // 2 + 3)
    first = np.repeat([1, 2, 3], (cut[0], cut[1] - cut[0], T - cut[1]))
    second = np.repeat([1, 2, 0], (T - 14, 5, 9))
    return jnp.asarray(np.stack([first, second]), jnp.int32)


def positions_of(segments):
    """0, 1, 2, ... in every document."""
    out = np.zeros(segments.shape, np.int32)
    for b, ids in enumerate(np.asarray(segments)):
        for t in range(1, len(ids)):
            out[b, t] = out[b, t - 1] + 1 if ids[t] == ids[t - 1] else 0
    return jnp.asarray(out)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def run(graphdef, state, tokens, segments, pattern, memory, layout):
    def loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model(
            tokens,
            positions=jax.lax.stop_gradient(segments[1]),
            segments=segments[0],
            pattern=pattern,
            memory=memory,
            layout=layout,
        )
        logits = model.logits(hidden) * (segments[0] > 0)[..., None]
        return jnp.mean(jnp.square(logits)), logits

    return jax.value_and_grad(loss, has_aux=True)(state)


def result(name, tokens, segments, pattern=FULL, memory=EVERYTHING, layout=None):
    graphdef, state = nnx.split(model_of(name))
    both = segments, positions_of(segments)
    return run(graphdef, state, tokens, both, pattern, memory, layout)


def assert_same(ours, theirs):
    """By norm: the gated norm divides outputs of a head that are nearly 0 by their size, and with
    it the rounding of a token here and there.
    """
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(x - y) <= 5e-4 * max(np.linalg.norm(y), 1e-3), x.shape


def test_a_document_does_not_read_another_and_no_token_reads_the_future():
    tokens, segments = row(80), packed(80)
    (_, logits), _ = result("dense", tokens, segments)
    for place in (5, 30, 41, 60):
        changed = tokens.at[:, place].set((tokens[:, place] + 1) % V)
        (_, other), _ = result("dense", changed, segments)
        apart = np.abs(np.asarray(logits - other)).max(-1) > 1e-6
        same = np.array(segments == segments[:, place : place + 1])
        same &= np.asarray(segments > 0) & (np.arange(80) >= place)
        assert not (apart & ~same).any()
        assert (apart == same)[:, place : place + 3].all()


@pytest.mark.slow
def test_a_packed_document_is_as_in_a_row_of_its_own():
    tokens, segments = row(80), packed(80)
    (_, logits), _ = result("dense", tokens, segments)
    alone = np.asarray(segments[0] == 2)
    single = jnp.broadcast_to(tokens[0][alone], (2, alone.sum()))
    (_, wanted), _ = result("dense", single, jnp.ones(single.shape, jnp.int32))
    assert_same(logits[0][alone], wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("tile", [pytest.param(16, marks=pytest.mark.slow), 30])
def test_tiles_change_nothing(tile):
    tokens, segments = row(160), packed(160)
    whole = result("dense", tokens, segments)
    tiled = result("dense", tokens, segments, memory=Memory("full", tile=tile))
    assert_same(tiled, whole)


SHIFTED = AttentionPattern("shifted", group=32)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name,size,mode,pattern,tile",
    [
        ("dense", 4, "halo", SHIFTED, 0),
        pytest.param("dense", 2, "halo", SHIFTED, 24, marks=slow),
        pytest.param("dense", 4, "auto", FULL, 0, marks=slow),
        pytest.param("dense", 2, "ulysses", FULL, 0, marks=slow),
        pytest.param("dense", 8, "halo", SHIFTED, 0, marks=slow),
        pytest.param("dense", 8, "halo", SHIFTED, 7, marks=slow),
        pytest.param("dense", 4, "ring", FULL, 16, marks=slow),
        pytest.param("experts", 2, "ulysses", FULL, 0, marks=slow),
        pytest.param("experts", 4, "halo", SHIFTED, 16, marks=slow),
        pytest.param("experts", 8, "auto", FULL, 0, marks=slow),
    ],
)
def test_devices_change_nothing(name, size, mode, pattern, tile):
    T = 256
    tokens, segments = row(T), packed(T)
    mesh = make_mesh(sequence=size, devices=jax.devices()[:size])
    layout, _ = layout_of(mesh, mode, pattern, T, model_of(name).spec)
    assert layout is not None and not layout.zigzag
    memory = Memory("full", tile=tile)
    alone = result(name, tokens, segments, pattern)
    assert_same(result(name, tokens, segments, pattern, memory, layout), alone)


@slow
def test_heads_over_tensor_devices_change_nothing():
    tokens, segments = row(64), packed(64)
    mesh = make_mesh(data=1, sequence=2, tensor=2, devices=jax.devices()[:4])
    layout, _ = layout_of(mesh, "auto", FULL, 64, model_of("dense").spec)
    assert_same(result("dense", tokens, segments, layout=layout), result("dense", tokens, segments))


def test_a_row_is_read_through_the_cache_in_pieces_with_padding_behind_them():
    """Rows of different lengths, forked and reordered; states do not grow with the slots."""
    model, tokens = model_of("dense"), row(90)
    (_, whole), _ = result("dense", tokens, jnp.ones((2, 90), jnp.int32))
    read = nnx.jit(lambda model, *args: model.continued(*args[:2], count=args[2]))
    empty = empty_cache(model.spec, 2, 96)
    assert cache_bytes(model.spec, 96, jnp.float32) < 2 * cache_bytes(model.spec, 48, jnp.float32)
    padded = tokens[:, :70].at[1, 66:].set(3)
    _, cache = read(model, empty, padded, jnp.asarray([70, 66]))
    cache = grow(take_rows(cache, jnp.asarray([1, 0])), 128)
    for i in range(6):
        step = jnp.stack([tokens[1, 66 + i], tokens[0, 70 + i]])[:, None]
        hidden, cache = read(model, cache, step, jnp.asarray([1, 1]))
        wanted = jnp.stack([whole[1, 66 + i], whole[0, 70 + i]])
        assert_same(model.logits(hidden[:, 0]), wanted)


def test_key_heads_that_do_not_spread_are_refused():
    spec = spec_from_hf(HF | {"num_key_value_heads": 4, "linear_num_value_heads": 6})
    mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
    with pytest.raises(ConfigError, match="mesh.tensor=4 does not divide the 2 key heads"):
        layout_of(mesh, "auto", FULL, 64, spec)


def test_what_a_config_must_not_say_is_named():
    with pytest.raises(ModelError, match="linear_num_value_heads=5 is no multiple"):
        spec_from_hf(HF | {"linear_num_value_heads": 5})
    with pytest.raises(ModelError, match=r"layer_types\[1\] 'mamba' is none of linear_attention"):
        spec_from_hf(HF | {"layer_types": ["linear_attention", "mamba"] * 2})


@pytest.mark.parametrize("gradient", [False, True])
def test_the_products_of_a_layer_are_counted(gradient):
    """Of four chunks of one row, all but the triangular solves, which are no products."""
    mixer = model_of("dense").layers[0].self_attn
    M, R, k, v = mixer.delta.M, mixer.delta.R, mixer.delta.k, mixer.delta.v
    T = 4 * CHUNK
    shapes = {"q": (M, k), "k": (M, k), "v": (M, R, v), "decay": (M, R), "beta": (M, R)}
    x = DeltaInputs(
        **{name: jnp.zeros((1, T, *shape)) for name, shape in shapes.items()},
        segments=jnp.ones((1, T), jnp.int32),
    )
    carry = DeltaCarry(jnp.zeros((1, M, R, k, v)), x.segments[:, 0])

    def run(q):
        return jnp.sum(delta_rule(dataclasses.replace(x, q=q), carry)[0])

    flops = mixer.row_flops(T, FULL)
    solves = T * CHUNK * M * R * (k + v)
    if not gradient:
        counted = products(jax.make_jaxpr(run)(x.q).jaxpr, 0)
        assert counted == flops.forward - solves
        return
    floats = [getattr(x, name) for name in shapes]

    def loss(*floats):
        return jnp.sum(delta_rule(DeltaInputs(*floats, x.segments), carry)[0] ** 2)

    program = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(*floats)
    counted = products(program.jaxpr, 0)
    whole = flops.forward + flops.backward + flops.recomputed
    assert abs(counted / (whole - 4 * solves) - 1) < 0.1
