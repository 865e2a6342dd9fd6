"""Q-GaLore on matrices whose gradient is known: the subspace it finds, when it looks again, the
step it takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.config import default_config
from lljax.models import quantize
from lljax.models.probe import multiply
from lljax.run.checkpoint import Checkpoints, abstract, describe
from lljax.training.q_galore import q_galore
from lljax.training.rule import StepGradients

GROUPS = {"down": "kernel/2", "up": "kernel/2", "norm": "norm"}
SHAPES = {"down": (2, 48, 32), "up": (2, 32, 48)}
R, RATE, SCALE = 4, 0.05, 0.5


dense = jax.jit(quantize.dense)


@jax.jit
def int8(x):
    return quantize.quantize(x, quantize.integer_form(8, x.shape[-2]), jnp.float32)


def rule(**changes):
    c = default_config().optimizer
    c.update(
        {
            "name": "q_galore",
            "learning_rate": RATE,
            "warmup_steps": 0,
            "schedule": "constant",
            "clip_norm": 1e9,
        }
    )
    c.galore.update({"rank": R, "update_every": 1, "scale": SCALE} | changes)
    return q_galore(c, 100, GROUPS, jnp.float32)


@functools.cache
def targets():
    """Of rank R, far from the first weights: the gradient of half the squared distance is of rank R
    at the first step.
    """
    rng = np.random.default_rng(0)
    weights = {
        name: int8(jnp.asarray(rng.normal(size=shape), jnp.float32))
        for name, shape in SHAPES.items()
    }
    far = {
        name: rng.normal(size=(2, shape[1], R)) @ rng.normal(size=(2, R, shape[2]))
        for name, shape in SHAPES.items()
    }
    return weights | {"norm": jnp.ones(8)}, {
        name: dense(weights[name]) - x.astype(np.float32) for name, x in far.items()
    }


def gradient(bind, x):
    def loss(x):
        leaves = bind(x)
        distance = sum(
            jnp.sum(
                (
                    jax.vmap(multiply, in_axes=(None, 0))(jnp.eye(t.shape[1]), dense(leaves[name]))
                    - t
                )
                ** 2
            )
            / 2
            for name, t in targets()[1].items()
        )
        return distance + jnp.sum((leaves["norm"] - 3) ** 2)

    return jax.value_and_grad(loss)(x)


@jax.jit
def jitted(items, ok, seed):
    """The items after a step, its gradients and loss, and whether it was applied."""
    r = rule()
    loss, grads, state = r.gradients(gradient, items["weights"], items["state"])
    gradients = StepGradients(values=grads, norm=jnp.float32(1), ok=ok, key=jax.random.key(seed))
    weights, state, applied = r.apply(items["weights"], items["state"], state, gradients)
    return {"weights": weights, "state": state}, grads, loss, applied


@functools.cache
def stepper():
    def step(items, ok=True, seed=0):
        return jitted(items, ok, seed)[:3]

    items = {"weights": targets()[0], "state": jax.jit(rule().init)(targets()[0])}
    # where a restored state lies too: compiled once
    return jax.device_put(items, jax.devices()[0]), step


def test_the_first_step_is_adam_in_the_leading_subspace():
    items, step = stepper()
    after, grads, _ = step(items)
    for name, target in targets()[1].items():
        G, P = dense(items["weights"][name]) - target, dense(after["state"].projection[name])
        longer = "lio,lir->lor" if name == "down" else "lio,lor->lir"
        inside = np.einsum(longer, G, P)
        # Four bits leave the basis of a subspace a little crooked; the gradient, of rank R, lies in
        # it.
        np.testing.assert_allclose(
            np.linalg.norm(inside, axis=(1, 2)), np.linalg.norm(G, axis=(1, 2)), rtol=0.08
        )
        got = np.swapaxes(grads[name], 1, 2) if name == "down" else grads[name]
        np.testing.assert_allclose(got, inside, atol=1e-3)
        N = np.sign(inside)  # Adam's first step
        update = (
            np.einsum("lor,lir->lio", N, P) if name == "down" else np.einsum("lir,lor->lio", N, P)
        )
        moved = dense(items["weights"][name]) - dense(after["weights"][name])
        coarse = np.asarray(items["weights"][name].scale).max()
        np.testing.assert_allclose(moved, RATE * SCALE * update, atol=1.5 * coarse)
        assert abs(np.mean(moved - RATE * SCALE * update)) < coarse / 10
    np.testing.assert_allclose(after["weights"]["norm"], 1 + RATE, rtol=1e-5)


def test_the_distance_falls_and_a_subspace_that_stays_is_looked_for_less_often():
    items, step = stepper()
    losses, due = [], []
    for i in range(12):
        items, _, loss = step(items, seed=i)
        losses.append(float(loss))
        due.append(int(items["state"].due["up"][0]))
    assert losses[-1] < 0.97 * losses[0]
    # Five agreements after the first, then twice as long, and twice again.
    assert due[:6] == [1, 2, 3, 4, 5, 7] and due[7:] == [11, 11, 11, 11, 19]


def test_a_step_that_is_not_applied_changes_nothing():
    items, step = stepper()
    after, _, _ = step(items, ok=False)
    assert describe(after) == describe(items)


def test_no_update_leaves_a_value_that_is_not_finite():
    items, _ = stepper()
    norm = jax.device_put(jnp.full(8, 3e38), jax.devices()[0])  # whose gradient is not finite
    items = items | {"weights": items["weights"] | {"norm": norm}}
    after, _, _, applied = jitted(items, True, 0)
    assert not applied and after["state"].count == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    assert describe(after["weights"]["norm"]) == describe(items["weights"]["norm"])


def test_a_restored_state_goes_on_bitwise(tmp_path):
    items, step = stepper()
    items, _, _ = step(items)
    checkpoints = Checkpoints(tmp_path, every_steps=1, every_minutes=1.0, keep=1)
    checkpoints.save(1, items, {}, {}, wait=True)
    _, restored, _ = checkpoints.restore(jax.tree.map(abstract, items))
    assert describe(step(restored)[0]) == describe(step(items)[0])


def test_the_state_is_small():
    shapes = {"down": (2, 4096, 2048), "up": (2, 2048, 4096)}
    weights = {name: int8(jnp.zeros(shape)) for name, shape in shapes.items()} | {
        "norm": jnp.ones(8)
    }
    state = jax.eval_shape(rule(rank=128).init, weights)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # Two bytes a value in the subspace [128, 2048], half a byte in the projection [4096, 128], and
    # their scales.
    assert size == pytest.approx(4 * 128 * (2 * 2048 + 4096 / 2), rel=0.06)
