"""Each optimizer against another's arithmetic, layer by layer, and in a training step on a tiny
model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import write_base
from transformers.optimization import Adafactor

from lljax.attention.pattern import FULL
from lljax.build import fill, mesh_of, placed_model
from lljax.config import default_config
from lljax.interop.open import open_base
from lljax.run.checkpoint import Checkpoints, abstract, describe
from lljax.training.optimizer import OPTIMIZERS, make_optimizer
from lljax.training.placement import layout_of, place
from lljax.training.rule import StepGradients, by_optax
from lljax.training.state import split
from lljax.training.step import make_step, step_settings

DIRECTIONS = [name for name, row in OPTIMIZERS.items() if row.direction]

# the first two: three layers
SHAPES = {"kernel": (3, 8, 12), "norm": (3, 8), "embed": (10, 8), "head": (8,)}
GROUPS = {"kernel": "kernel/3", "norm": "norm/3", "embed": "embed", "head": "head"}
DECAY, RATE = 0.1, 0.01


def leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32) * scale for name, shape in SHAPES.items()
    }


def optimizer_of(name, **changes):
    c = default_config().optimizer
    c.update(
        {
            "name": name,
            "learning_rate": RATE,
            "warmup_steps": 0,
            "schedule": "constant",
            "clip_norm": 1e9,
        }
    )
    c.learning_rate_ratio.embed, c.weight_decay.kernel = 2.0, DECAY
    c.update_from_flattened_dict(changes)
    return c


def ours(name, steps=4, order=(0, 1, 2), **changes):
    """The leaves after some steps whose gradients are random, their layers taken in another order;
    and the last state.
    """

    def permuted(tree):
        return {
            name: jnp.asarray(x[np.array(order)] if name in ("kernel", "norm") else x)
            for name, x in tree.items()
        }

    optimizer = make_optimizer(optimizer_of(name, **changes), steps, GROUPS)
    params = permuted(leaves(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for i in range(steps):
        params, state = step(params, state, permuted(leaves(i + 1)))
    return jax.tree.map(np.asarray, params), state


def by_layer(tree):
    """Every layer of a stacked leaf by itself."""
    return {
        (name, i): x
        for name, all in tree.items()
        for i, x in enumerate(all if name in ("kernel", "norm") else [all])
    }


def by_torch(make, steps=4):
    """The same steps, each layer a parameter of `make(parameters, lr, weight_decay)`."""
    out = {}
    for (name, i), x in by_layer(leaves(0)).items():
        parameter = torch.nn.Parameter(torch.tensor(x))
        optimizer = make(
            [parameter],
            RATE * (2.0 if name == "embed" else 1.0),
            DECAY if name == "kernel" else 0.0,
        )
        for step in range(steps):
            parameter.grad = torch.tensor(by_layer(leaves(step + 1))[name, i])
            optimizer.step()
        out[name, i] = parameter.detach().numpy()
    return out


def numpy_lion(parameters, lr, weight_decay):
    """Chen et al. 2023, algorithm 2, in the place of a torch optimizer."""

    class Lion:
        momentum = 0.0

        def step(self):
            p, g = parameters[0].detach().numpy(), parameters[0].grad.numpy()
            p -= lr * (np.sign(0.9 * self.momentum + 0.1 * g) + weight_decay * p)
            self.momentum = 0.95 * self.momentum + 0.05 * g

    return Lion()


THEIRS = {
    "adamw": lambda p, lr, wd: torch.optim.AdamW(
        p, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=wd
    ),
    "adafactor": lambda p, lr, wd: Adafactor(
        p, lr=lr, weight_decay=wd, scale_parameter=False, relative_step=False
    ),
    "lion": numpy_lion,
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_update_is_that_of_another_implementation(name):
    wanted, (got, _) = by_torch(THEIRS[name]), ours(name)
    for key, x in by_layer(got).items():
        # transformers' Adafactor decays before it adds the update, not after.
        np.testing.assert_allclose(x, wanted[key], atol=2e-5, err_msg=str(key))


def test_muon_makes_the_momentum_of_each_matrix_orthogonal_and_leaves_the_rest_to_adamw():
    (got, _), (adamw, _) = ours("muon", steps=1), ours("adamw", steps=1)
    for name in ("norm", "embed", "head"):
        np.testing.assert_array_equal(got[name], adamw[name])
    for before, after, gradient in zip(
        leaves(0)["kernel"], got["kernel"], leaves(1)["kernel"], strict=True
    ):
        update = (before * (1 - RATE * DECAY) - after) / RATE
        x = gradient / np.linalg.norm(gradient)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        np.testing.assert_allclose(update, 0.2 * np.sqrt(12) * x, atol=1e-3)


@pytest.mark.parametrize("rank,gap", [(2, 3), (8, 1)])
def test_galore_is_adam_in_the_leading_subspace(rank, gap):
    got, _ = ours(
        "galore", **{"galore.rank": rank, "galore.update_every": gap, "galore.scale": 0.5}
    )
    for layer in range(3):
        w, m, v = leaves(0)["kernel"][layer], 0, 0
        for t in range(1, 5):
            g = leaves(t)["kernel"][layer]
            if (t - 1) % gap == 0:  # [in, out] = [8, 12]: of the outputs
                q = np.linalg.svd(g)[2][:rank].T
            r = g @ q
            m, v = 0.9 * m + 0.1 * r, 0.95 * v + 0.05 * r * r
            n = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            w = w - RATE * (0.5 * n @ q.T + DECAY * w)
        np.testing.assert_allclose(got["kernel"][layer], w, atol=1e-5)
    adamw, _ = ours("adamw")
    for name in ("norm", "embed", "head"):
        np.testing.assert_array_equal(got[name], adamw[name])


@pytest.mark.parametrize("name", DIRECTIONS)
def test_layers_of_a_stack_do_not_mix(name):
    (straight, _), (turned, _) = ours(name), ours(name, order=(2, 0, 1))
    for leaf in ("kernel", "norm"):
        np.testing.assert_allclose(straight[leaf][np.array([2, 0, 1])], turned[leaf], atol=1e-6)


SMALL = dict.fromkeys(
    ("galore", "q_galore"),
    {
        "optimizer.galore.rank": 16,
        "optimizer.galore.scale": 1.0,
        "optimizer.galore.update_every": 2,
    },
)


def tiny_steps(run_config, name, steps, devices=1, **changes):
    """The losses of steps on one batch, and the last state."""
    run_config.train_type = "full"
    run_config.optimizer.update({"name": name, "learning_rate": 3e-3 if name != "lion" else 1e-3})
    run_config.update_from_flattened_dict(changes)
    base, mesh = (
        open_base(run_config.model.path, ""),
        mesh_of(run_config.mesh, jax.devices()[:devices]),
    )
    model = placed_model(run_config, base.config, mesh)
    layout, _ = layout_of(mesh, "auto", FULL, 32, model.spec)
    fill(model, run_config, base, mesh)
    parts = split(run_config, model, mesh)
    step = make_step(parts, step_settings(run_config))
    tokens = (
        np.random.default_rng(0)
        .integers(0, 300, (run_config.training.accumulate * 8, 32))
        .astype(np.int32)
    )
    rows = {
        "tokens": tokens,
        "targets": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape),
    }
    batch, state, losses = (
        place(rows, run_config.training.accumulate, mesh, layout),
        parts.state,
        [],
    )
    for _ in range(steps):
        state, metrics = step(state, parts.frozen, batch, FULL, layout)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize(
    "name,changes",
    [
        ("adamw", {"eps": 0.0}),
        ("adamw", {"weight_decay.kernel": float("nan")}),
        ("lion", {"learning_rate": float("inf")}),
        ("adamw8bit", {"beta1": 1.0}),
    ],
)
def test_an_update_that_would_leave_a_value_that_is_not_finite_is_not_applied(name, changes):
    """Whatever makes it so: settings that should have been refused stand for it here."""
    rule = by_optax(make_optimizer(optimizer_of(name, **changes), 4, GROUPS))
    params = jax.tree.map(jnp.asarray, leaves(0))
    state, grads = rule.init(params), params | {"embed": jnp.zeros_like(params["embed"])}
    gradients = StepGradients(values=grads, norm=1.0, ok=True, key=jax.random.key(0))
    after = jax.jit(rule.apply)(params, state, state, gradients)
    assert not after[2] and describe(after[:2]) == describe((params, state))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_restored_state_goes_on_bitwise(name, tmp_path):
    optimizer = make_optimizer(optimizer_of(name), 4, GROUPS)

    @jax.jit
    def step(items, grads):
        updates, state = optimizer.update(grads, items["state"], items["params"])
        return {"params": jax.tree.map(jnp.add, items["params"], updates), "state": state}

    params = jax.tree.map(jnp.asarray, leaves(0))
    items = step({"params": params, "state": optimizer.init(params)}, leaves(1))
    checkpoints = Checkpoints(tmp_path, every_steps=1, every_minutes=1.0, keep=1)
    checkpoints.save(1, items, {}, {}, wait=True)
    _, restored, _ = checkpoints.restore(jax.tree.map(abstract, items))
    assert describe(step(restored, leaves(2))) == describe(step(items, leaves(2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(run_config, name):
    losses, _ = tiny_steps(run_config, name, 6, **SMALL.get(name, {}))
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_take_the_steps_of_one(run_config, name):
    alone, _ = tiny_steps(run_config, name, 4, **SMALL.get(name, {}))
    together, state = tiny_steps(
        run_config, name, 4, devices=8, **{"mesh.fsdp": 4, "mesh.tensor": 2}, **SMALL.get(name, {})
    )
    np.testing.assert_allclose(together, alone, rtol=2e-3)
    # adafactor keeps vectors of each matrix, on every device
    cut = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.optimizer))
    assert cut or name == "adafactor"


STACKS = {
    "local and global layers": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 24,
    },
    "experts behind a dense layer": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 6,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "tie_word_embeddings": False,
    },
    "fused projections": {"model_type": "phi3", "pad_token_id": 0, "tie_word_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", STACKS)
def test_q_galore_of_every_stack_and_expert(run_config, tmp_path, family):
    run_config.model.path, run_config.context.rope.type = (
        write_base(tmp_path / "base", **STACKS[family]),
        "keep",
    )
    run_config.context.length, run_config.context.schedule = 32, ((8, 32, "full"),)
    alone, _ = tiny_steps(run_config, "q_galore", 6, **SMALL["q_galore"])
    assert alone[-1] < alone[0] - 0.3, alone
    mesh = {"mesh.fsdp": 1, "mesh.expert": 2, "mesh.sequence": 2, "mesh.tensor": 2}
    together, _ = tiny_steps(run_config, "q_galore", 4, devices=8, **mesh)
    np.testing.assert_allclose(together, alone[:4], rtol=2e-3)


@pytest.mark.parametrize("norm,clips", [(0.0, False), (1e9, False), (1e-3, True)])
def test_a_clip_norm_of_zero_clips_nothing(norm, clips):
    optimizer = make_optimizer(optimizer_of("lion", clip_norm=norm, beta1=0.0), 4, GROUPS)
    params, gradient = leaves(0), leaves(1)
    moments = optimizer.update(gradient, optimizer.init(params), params)[1]
    momentum = next(x for x in jax.tree.leaves(moments) if x.shape == SHAPES["embed"])
    assert np.allclose(momentum, 0.05 * gradient["embed"], rtol=1e-4) != clips
