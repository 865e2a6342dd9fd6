"""The experts of a layer against a loop over all of them, values and gradients."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.build import move
from lljax.models import grouped, lora
from lljax.models.declare import declared
from lljax.models.memory import Memory, fold_tiles, map_tiles
from lljax.models.moe import ExpertsBesideMLP, MoE
from lljax.models.router import no_load
from lljax.models.spec import BesideNorms, MLPNames, MoESpec
from lljax.parallel.sharding import Layout, batch_sharding, make_mesh

B, T, D, EPS = 2, 60, 12, 1e-6
ROUTERS = {
    "softmax": {},
    "softmax, normalized": {"normalize": True, "shared": 6, "shared_gate": True},
    "sigmoid, corrected, groups, scaled": {
        "score": "sigmoid",
        "normalize": True,
        "correction": True,
        "groups": 4,
        "best_groups": 2,
        "scale": 2.5,
        "shared": 10,
    },
    "sigmoid of the best, on the input": {
        "score": "sigmoid",
        "best_first": True,
        "on_input": True,
        "fused": "halves",
        "k": 2,
    },
    "softmax, beside an MLP, input and experts scaled": {
        "normalize": True,
        "fused": "rows",
        "k": 2,
        "beside": BesideNorms("before_mlp", "after_mlp", "before_experts", "after_experts"),
        "router_scales": ("router.scale", "router.per_expert_scale"),
    },
    "softmax of the best, clamped": {
        "best_first": True,
        "fused": "turns",
        "bias": True,
        "clamp": (1.7, 0.5),
        "k": 2,
    },
}


def build(**fields):
    moe = MoESpec(**({"E": 8, "k": 3, "F": 10} | fields))
    spec: Any = SimpleNamespace(
        D=D,
        F=14,
        moe=moe,
        mlp_bias=False,
        activation="gelu_tanh" if moe.beside else "silu",
        mlp=MLPNames(),
        norm_eps=EPS,
        norm_plus_one=False,
    )
    layer = "model.layers.0"
    beside = moe.beside is not None
    model = ExpertsBesideMLP(spec, layer, layer) if beside else MoE(spec, f"{layer}.mlp")
    lora.attach(model, rank=2, alpha=4.0, targets=("all-linear",))
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        variable.set_value(
            jnp.asarray(rng.normal(size=variable.get_value().shape) * 0.4, jnp.float32)
        )
    return model


def dense(model, x):
    """Every expert for every token, and a weight of zero where it was not chosen."""
    moe, gate, residual, routed = model.moe, model.gate, x, x
    weights = jnp.zeros((*x.shape[:-1], moe.E))
    if moe.beside:
        routed = normalized(x) * gate.input_scale[...] / D**0.5
        x = normalized(x) * model.norm.weight[...]
    logits = routed @ gate.weight[...] + (gate.bias[...] if moe.bias else 0)
    scores = jax.nn.sigmoid(logits) if moe.score == "sigmoid" else jax.nn.softmax(logits)
    ranks = scores + (gate.correction[...] if moe.correction else 0)
    if moe.groups > 1:
        groups = jnp.split(ranks, moe.groups, axis=-1)
        worth = jnp.stack([jnp.sort(g)[..., -2:].sum(-1) for g in groups], axis=-1)
        least = jnp.sort(worth)[..., -moe.best_groups, None]
        ranks = jnp.concatenate(
            [
                jnp.where(w >= least, g, -9)
                for g, w in zip(groups, jnp.split(worth, moe.groups, axis=-1), strict=True)
            ],
            axis=-1,
        )
    chosen = ranks >= jnp.sort(ranks)[..., -moe.k, None]
    # the sigmoid of a logit does not ask whether others were there
    weights = jnp.where(chosen, scores, 0)
    if moe.normalize or moe.best_first and moe.score == "softmax":
        weights /= weights.sum(-1, keepdims=True)
    weights *= moe.scale * (1 if gate.expert_scale is None else gate.expert_scale[...])

    def linear(layer, x):  # of every expert: [E, B, T, in] -> [E, B, T, out]
        a, b = layer.lora.a[...][:, None], layer.lora.b[...][:, None]
        bias = 0 if layer.bias is None else layer.bias[...][:, None, None]
        return x @ layer.kernel[...][:, None] + layer.lora.scale * (x @ a) @ b + bias

    weights = jnp.moveaxis(weights, -1, 0)[..., None]
    into = jnp.broadcast_to(x, (moe.E, *x.shape)) * (weights if moe.on_input else 1)
    gate, up = linear(model.experts.gate_proj, into), linear(model.experts.up_proj, into)
    hidden = (jax.nn.gelu(gate) if moe.beside else jax.nn.silu(gate)) * up
    if moe.clamp:
        gate, up = jnp.minimum(gate, 0.5), jnp.clip(up, -0.5, 0.5)
        hidden = gate * jax.nn.sigmoid(1.7 * gate) * (up + 1)
    y = jnp.sum(linear(model.experts.down_proj, hidden) * (1 if moe.on_input else weights), axis=0)
    if moe.shared:
        shared = model.shared(x)
        y += shared * jax.nn.sigmoid(model.shared_gate(x)) if moe.shared_gate else shared
    if moe.beside:
        beside = model.dense(normalized(residual) * model.before_mlp.weight[...])
        y = normalized(y) * model.after_experts.weight[...]
        y += normalized(beside) * model.after_mlp.weight[...]
    return y


def normalized(x):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)


def value_and_gradients(model, apply, x):
    """Of a loss in x and in every weight."""
    graphdef, weights = nnx.split(model)

    def loss(weights, x):
        return jnp.mean(jnp.sin(apply(nnx.merge(graphdef, weights), x)))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(nnx.as_pure(weights), x)


def assert_same(got, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() <= tolerance * jnp.abs(b).max() + 1e-7


X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "router",
    [
        pytest.param(
            router,
            marks=() if router.split()[-1] in ("scaled", "input", "clamped") else pytest.mark.slow,
        )
        for router in ROUTERS
    ],
)
def test_experts_equal_a_loop_over_all_of_them(router, monkeypatch):
    # so that an expert has several blocks, and a block several experts
    monkeypatch.setattr(grouped, "BLOCK", 32)
    model = build(**ROUTERS[router])
    assert_same(
        value_and_gradients(model, lambda model, x: model(x)[0], X),
        value_and_gradients(model, dense, X),
    )


def test_a_tile_at_a_time_and_computed_again():
    model = build(shared=6)

    def in_tiles(model, x):
        return map_tiles(lambda x, key: model(x, key)[0], x, None, Memory("full", tile=16), None)

    assert_same(
        value_and_gradients(model, jax.checkpoint(in_tiles), X),
        value_and_gradients(model, dense, X),
    )


@pytest.mark.slow
def test_every_token_may_go_to_one_expert():
    model = build(E=4, k=2)
    model.gate.weight.set_value(model.gate.weight[...].at[:, 1:3].set(50.0 * jnp.ones((D, 2))))
    x = jnp.abs(X)
    assert_same(
        value_and_gradients(model, lambda model, x: model(x)[0], x),
        value_and_gradients(model, dense, x),
        1e-4,
    )


def test_the_load_counts_choices_and_sums_probabilities():
    model = build(score="sigmoid")
    counted = np.random.default_rng(3).random((B, T)) < 0.7
    load = nnx.jit(lambda model, x: model(x, counted=counted)[1])(model, X)
    scores = np.asarray(jax.nn.sigmoid(X @ model.gate.weight[...]))
    chosen = scores >= np.sort(scores)[..., -model.moe.k, None]
    wanted = [
        np.sum(x * counted[..., None], axis=1)
        for x in (chosen, scores / scores.sum(-1, keepdims=True))
    ]
    np.testing.assert_allclose(load, np.stack(wanted, axis=1)[:, None], rtol=1e-5)


def test_bfloat16_compute():
    model = build()
    y = nnx.jit(lambda model, x: model(x)[0])(model, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert np.median(jnp.abs(y - dense(model, X)) / jnp.abs(dense(model, X)).max()) < 0.01


@pytest.mark.parametrize(
    "sizes", [(7, 0, 30, 3), (0, 0, 0, 0), (0, 64, 0, 0), (16, 16, 16, 16), (1, 0, 0, 62)]
)
def test_blocks_equal_ragged_dot(sizes, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 16)
    x, w = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(64, 5), (4, 5, 7)])
    )
    sizes = jnp.asarray(sizes)

    @functools.partial(jax.jit, static_argnums=0)
    def run(dot, x, w):
        rows = jnp.arange(64)[:, None] < sizes.sum()
        return jax.value_and_grad(
            lambda x, w: jnp.sum(jnp.where(rows, jnp.sin(dot(x, w, sizes)), 0)), (0, 1)
        )(x, w)

    assert_same(run(grouped.blocked_dot, x, w), run(jax.lax.ragged_dot, x, w))


# ---------------------------------------------------------------- over eight devices

MESHES = [
    {"expert": 2, "fsdp": 2, "sequence": 2},
    {"expert": 4, "tensor": 2},
    {"expert": 8},
    {"data": 2, "sequence": 4},
]
COUNTED = np.random.default_rng(2).random((8, 24)) < 0.8
ROWS = np.random.default_rng(1).normal(size=(8, 24, D)).astype(np.float32)


def with_load(y, load):
    """Both in one, so that the gradient goes through both; a device's part of the load counts as
    much as another's.
    """
    return y + jnp.mean(load * jnp.linspace(-1, 1, 8))


def over(mesh, model, memory):
    move(model, mesh)
    layout = Layout(mesh)

    def apply(model, x):
        def add(load, xs, key):
            y, more = model(xs[0], key, layout, xs[1])
            return load + more, y

        load, y = fold_tiles(
            add, no_load(model.moe, COUNTED, layout), (x, COUNTED), None, memory, layout
        )
        return with_load(y, load.sum(1))

    return value_and_gradients(
        model, jax.checkpoint(apply), jax.device_put(ROWS, batch_sharding(mesh, 2))
    )


def on_one(model):
    def apply(model, x):
        y, load = model(x, counted=COUNTED)
        return with_load(y, load.sum(1))

    return value_and_gradients(model, apply, ROWS)


def cases():
    for sizes in MESHES:
        for router in ROUTERS:
            quick = "corrected" in router and sizes == MESHES[0]
            yield pytest.param(
                router, sizes, marks=() if quick else pytest.mark.slow, id=f"{router}, {sizes}"
            )


@pytest.mark.parametrize("router,sizes", list(cases()))
def test_experts_over_devices_equal_one_device(router, sizes):
    wanted = on_one(build(**ROUTERS[router]))
    assert_same(over(make_mesh(**sizes), build(**ROUTERS[router]), Memory("full", tile=4)), wanted)


@pytest.mark.slow
def test_no_token_is_dropped_where_all_go_to_the_experts_of_one_device():
    def crowded():
        model = build(E=8, k=2)
        model.gate.weight.set_value(model.gate.weight[...].at[:, :2].set(50.0).at[:, 2:].set(-50.0))
        return model

    mesh = make_mesh(expert=4, sequence=2)
    assert_same(over(mesh, crowded(), Memory("full")), on_one(crowded()))
