"""What linear layers read, and the scales that fold into the modules before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import read, write_torch
from flax import nnx

from lljax.compression import methods
from lljax.compression.layers import LayerStream, Rows
from lljax.compression.methods import Settings
from lljax.compression.observe import linear_layers
from lljax.interop.layouts import Scheme
from lljax.models.linear import ACTIVATIONS
from lljax.models.moe import ExpertLinear
from lljax.parallel.sharding import Layout, make_mesh

T = 24
FAMILIES = ["llama with biases", "qwen2_moe"]
FAMILIES += [
    pytest.param(family, marks=pytest.mark.slow)
    for family in (
        "phi3",
        "gemma3_text",
        "gemma4_text with experts",
        "gemma4_text with values of their own",
        "qwen3_moe",
        "deepseek_v3",
        "olmo2",
        "glm4",
        "mistral4",
    )
]


def rows_of(vocabulary, count=2):
    """Packed rows of two documents, the last row with padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (count, T)).astype(np.int32)
    segments = np.where(np.arange(T) < 10, 1, 2) * np.ones((count, 1), np.int32)
    segments[-1, -5:] = 0
    positions = np.where(np.arange(T) < 10, np.arange(T), np.arange(T) - 10)
    return Rows(tokens, segments.astype(np.int32), np.tile(positions, (count, 1)).astype(np.int32))


@pytest.fixture(scope="module", params=FAMILIES)
def stream(request, tmp_path_factory):
    """(base, model, rows, stream) of a family, before its last layer."""
    folder = tmp_path_factory.mktemp("model")
    write_torch(folder, request.param)
    base, model = read(folder)
    rows = rows_of(model.spec.V)
    stream = LayerStream(model.spec, rows, dtype=jnp.float32)
    stream.embed(base)
    for number in range(model.spec.L - 1):
        stream.advance(stream.load(base, number))
    return base, model, rows, stream


@pytest.mark.sample(3)
def test_a_stream_gives_the_hidden_states_of_the_model(stream):
    base, model, rows, stream = stream
    last = stream.load(base, model.spec.L - 1)
    before = stream.hidden.copy()
    stream.advance(last)
    found, stream.hidden = stream.hidden, before
    wanted = model(
        jnp.asarray(rows.tokens),
        positions=jnp.asarray(rows.positions),
        segments=jnp.asarray(rows.segments),
    )
    real = rows.segments > 0
    difference = np.abs(np.asarray(model.norm(jnp.asarray(found))) - np.asarray(wanted))[real]
    assert difference.max() < 1e-5 * np.abs(np.asarray(wanted)[real]).max()


def test_sums_are_over_what_each_linear_layer_reads(stream):
    base, model, rows, stream = stream
    layer = stream.load(base, model.spec.L - 1)
    observed = stream.observe(layer)
    assert {name for names in observed for name in names} == set(linear_layers(layer))
    x = jnp.asarray(stream.hidden)
    x = x if layer.norm_before_mixer is None else layer.norm_before_mixer(x)
    x = np.asarray(x)[rows.segments > 0]
    shared = [names for names in observed if "self_attn.v_proj" in names]
    if shared:  # MLA has none
        first = observed[shared[0]]
        assert {"self_attn.q_proj", "self_attn.k_proj"} <= set(shared[0])
        np.testing.assert_allclose(first.gram, x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(first.size, np.abs(x).sum(0), rtol=1e-4)


def test_a_tile_at_a_time_gives_the_same_sums(stream):
    base, model, rows, whole = stream
    tiled = LayerStream(model.spec, rows, dtype=jnp.float32, tile=10)
    tiled.hidden = whole.hidden
    layer = whole.load(base, model.spec.L - 1)
    for found, wanted in zip(
        jax.tree.leaves(tiled.observe(layer)), jax.tree.leaves(whole.observe(layer)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.sample(2)
def test_devices_that_share_a_row_give_the_same_sums(stream):
    base, model, rows, one = stream
    layout = Layout(make_mesh(sequence=4, devices=jax.devices()[:4]), "allgather")
    many = LayerStream(model.spec, rows, dtype=jnp.float32, layout=layout)
    many.hidden = one.hidden.copy()
    number = model.spec.L - 1
    sums = many.observe(many.load(base, number)), one.observe(one.load(base, number))
    for found, wanted in zip(*map(jax.tree.leaves, sums), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    many.advance(many.load(base, number))
    before = one.hidden.copy()
    one.advance(one.load(base, number))
    real = rows.segments > 0
    np.testing.assert_allclose(many.hidden[real], one.hidden[real], rtol=1e-4, atol=1e-4)
    one.hidden = before


def test_every_expert_reads_every_token(stream):
    base, model, rows, stream = stream
    layer = stream.load(base, model.spec.L - 1)
    names = ("mlp.experts.down_proj",)
    observed = stream.observe(layer)
    if names not in observed:
        pytest.skip("no experts")
    real = jnp.asarray(rows.segments > 0)
    operands = layer.project(
        (jnp.asarray(stream.hidden), _context(model, layer, rows).positions), None
    )
    mixed, _ = layer.self_attn.mix(operands, _context(model, layer, rows), None)
    mixed = layer.self_attn.output(mixed, None)
    if layer.norm_after_mixer is not None:
        mixed = layer.norm_after_mixer(mixed)
    x = jnp.asarray(stream.hidden) + mixed
    x = (layer.mlp.norm or layer.norm_before_mlp)(x)[real]
    experts, activation = layer.mlp.experts, ACTIVATIONS[model.spec.activation]
    for e in (0, model.spec.moe.E - 1):
        hidden = activation(x @ experts.gate_proj.kernel[e]) * (x @ experts.up_proj.kernel[e])
        np.testing.assert_allclose(observed[names].gram[e], hidden.T @ hidden, rtol=1e-3, atol=1e-4)


def _context(model, layer, rows):
    return model.context(
        layer.layer,
        positions=jnp.asarray(rows.positions),
        segments=jnp.asarray(rows.segments),
    )


@pytest.mark.sample(2)
def test_scales_that_fold_leave_the_layer_as_it_was(stream, monkeypatch):
    """AWQ with random scales and no rounding: the layer computes the same."""
    base, model, rows, stream = stream
    layer = stream.load(base, model.spec.L - 1)
    observed = stream.observe(layer)
    graphdef, state = nnx.split(layer)
    before = layer(jnp.asarray(stream.hidden), _context(model, layer, rows))[0]
    rng = np.random.default_rng(0)

    def scales(linears, sums, settings, expert=None):
        return jnp.asarray(np.exp(rng.standard_normal(len(sums.size))), jnp.float32)

    monkeypatch.setattr(methods, "_scales", scales)
    folded = [names for _, names in methods.folds(layer, observed)]
    methods.awq_layer(layer, set(), observed, Settings(Scheme(4, group=-1), (), False))
    after = layer(jnp.asarray(stream.hidden), _context(model, layer, rows))[0]
    real = rows.segments > 0
    np.testing.assert_allclose(after[real], before[real], rtol=1e-3, atol=1e-4)
    readers = {name for names in folded for name in names}
    if layer.norm_before_mlp is not None:  # else nothing can take the scales of what the MLP reads
        assert {name for name in linear_layers(layer) if "up_proj" in name} <= readers
    assert {name for name in linear_layers(layer) if "down_proj" in name} <= readers


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_rounds_every_kernel_and_gptq_loses_least(stream, method):
    base, model, rows, stream = stream
    layer = stream.load(base, model.spec.L - 1)
    observed = stream.observe(layer)
    names = set(linear_layers(layer)) - {"mlp.shared_gate"}
    settings = Settings(Scheme(4, group=-1), (np.dtype(np.float32),) * 2, False)
    kernels = methods.METHODS[method].run(layer, names, observed, settings)
    assert set(kernels) == names
    for name, of in kernels.items():
        linear = linear_layers(layer)[name]
        experts = len(linear.kernel[...]) if isinstance(linear, ExpertLinear) else 1
        assert len(of) == experts
        assert all(0 <= kernel.error < 0.2 for kernel in of), (name, of)
