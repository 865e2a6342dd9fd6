"""The TPU kernels of the gated delta rule, interpreted, against the recurrence token by token; and,
slowly, compiled for TPUs.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_delta_rule import CASES, PACKED, empty, inputs, token_by_token

from lljax.models.mixers import delta_chunk, delta_parallel, delta_rule, delta_scan, delta_tpu
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs
from lljax.models.mixers.delta_scan import Channels, Projected
from lljax.parallel.sharding import Layout, make_mesh

FLOATS = "q", "k", "v", "decay", "beta"
kernels = functools.partial(delta_tpu.delta_rule, interpret=True)
# Interpreted kernels are large programs of small operations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=(0, 1))
def values_and_gradients(rule, group, x, state):
    """group: only to compile again for another `delta_tpu.GROUP`."""
    weight = jnp.asarray(np.random.default_rng(5).normal(size=x.v.shape), jnp.float32)
    weight *= (x.segments > 0)[..., None, None, None]

    def loss(floats, state):
        carry = DeltaCarry(state, x.segments[:, 0])
        out, after = rule(dataclasses.replace(x, **floats), carry)
        return jnp.sum(out * weight) + jnp.sum(after.state**2), (out * (weight != 0), after)

    floats = {name: getattr(x, name) for name in FLOATS}
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(floats, state)


def assert_kernels_equal_the_recurrence(x, state, group):
    ours = values_and_gradients(kernels, group, x, state)
    theirs = values_and_gradients(token_by_token, group, x, state)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_kernels_equal_the_recurrence_in_values_and_gradients(monkeypatch):
    """Rows of two groups, of which the second is not full, and two value heads of a key head;
    documents and padding; keys all alike.
    """
    monkeypatch.setattr(delta_tpu, "GROUP", 2)
    names = (
        "not a whole number of chunks",
        "packed and padded",
        "keys that are all alike, nothing forgotten",
    )
    for x in (CASES[name] for name in names):  # of one shape: compiled once
        assert_kernels_equal_the_recurrence(x, empty(x, seed=9).state, group=2)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", [*CASES, "several pairs in a group"])
def test_groups_of_several_pairs_equal_the_recurrence(name, heads):
    x = CASES[name] if name in CASES else inputs(500, seed=6)
    narrow = {n: getattr(x, n)[:, :, :, :heads] for n in ("v", "decay", "beta")}
    state = empty(x, seed=9).state[:, :, :heads]
    group = delta_tpu.GROUP
    assert_kernels_equal_the_recurrence(dataclasses.replace(x, **narrow), state, group)


@pytest.mark.slow
def test_bfloat16_is_within_its_rounding():
    wide = inputs(200, seed=7, segments=PACKED)
    narrow = inputs(200, seed=7, segments=PACKED, dtype=jnp.bfloat16)
    state, group = empty(wide, seed=9).state, delta_tpu.GROUP
    wanted = values_and_gradients(token_by_token, group, wide, state)
    ours = values_and_gradients(kernels, group, narrow, state)
    theirs = values_and_gradients(delta_rule.delta_rule, group, narrow, state)
    for a, b, c in zip(*(jax.tree.leaves(t) for t in (ours, theirs, wanted)), strict=True):
        a, b, c = (np.asarray(value, np.float64) for value in (a, b, c))
        error = np.linalg.norm(a - c)
        assert error <= 1e-2 * np.linalg.norm(c)
        assert error <= 2 * np.linalg.norm(b - c) + 1e-3 * np.linalg.norm(c)  # that of XLA's form


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-4)])
def test_the_triangular_inverse_is_exact(dtype, tolerance):
    """Also of the worst case: keys that are all alike and nothing forgotten, whose powers have
    entries of 1e18.
    """
    rng = np.random.default_rng(0)
    one = np.tril(np.full((64, 64), 0.99), -1)
    other = np.tril(rng.normal(size=(64, 64)) * 0.2, -1)
    system = jnp.asarray(np.concatenate([one, other], axis=1), jnp.float32)
    with jax.default_matmul_precision("highest"):
        ours = jit(delta_chunk.inverse, static_argnums=1)(system, dtype)
    for got, wanted in zip(np.split(np.asarray(ours), 2, axis=1), (one, other), strict=True):
        wanted = np.linalg.inv(np.eye(64) + wanted)
        assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


def of_size(k, v, trunks=None):
    zeros = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    keys, heads = zeros((1, 300, 2, k)), zeros((1, 300, 2, 2))
    segments = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    return DeltaInputs(keys, keys, zeros((1, 300, 2, 2, v)), heads, heads, segments, trunks)


def test_the_kernels_serve_tpus_only_and_heads_of_whole_registers_without_branches():
    x, segments = of_size(128, 256), jax.ShapeDtypeStruct((1, 300), jnp.int32)
    assert delta_scan.rule_for(x, "tpu") is delta_tpu.delta_rule
    others = [(x, "cpu"), (x, "gpu"), (of_size(96, 128), "tpu"), (of_size(128, 64), "tpu")]
    others.append((of_size(128, 128, segments), "tpu"))
    assert all(delta_scan.rule_for(*case) is delta_rule.delta_rule for case in others)


def test_the_kernels_are_lowered_for_tpus():
    x = of_size(128, 128)
    carry = DeltaCarry(
        jax.ShapeDtypeStruct((1, 2, 2, 128, 128), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    def loss(q, x, carry):
        return jnp.sum(delta_tpu.delta_rule(dataclasses.replace(x, q=q), carry)[0])

    lowered = jax.jit(jax.grad(loss)).trace(x.q, x, carry).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2


@pytest.mark.slow
def test_devices_change_nothing(monkeypatch):
    """Rows, heads and tokens over eight devices, each of which runs the kernels."""
    monkeypatch.setattr(delta_scan, "rule_for", lambda x, platform: kernels)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    B, T, M, R, k, v, taps = 2, 96, 2, 2, 8, 6, 4
    channels = Channels(normal(B, T, M, k), normal(B, T, M, k), normal(B, T, M, R, v))
    x = Projected(channels, -jnp.exp(normal(B, T, M, R)), jax.nn.sigmoid(normal(B, T, M, R)))
    weights = Channels(normal(M, k, taps), normal(M, k, taps), normal(M, R, v, taps))
    segments = jnp.asarray([[1] * 40 + [2] * 56, [1] * 90 + [0] * 6], jnp.int32)

    def run(layout):
        def loss(x):
            out = delta_parallel.mix(x, weights, segments, layout)
            return jnp.sum(jnp.sin(out) * (segments > 0)[..., None, None, None])

        return jit(jax.value_and_grad(loss))(x)

    layout = Layout(make_mesh(data=2, sequence=2, tensor=2), "allgather")
    for a, b in zip(jax.tree.leaves(run(layout)), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


# ---------------------------------------------------------------- compiled
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e-8", "v5p-8", "v6e-8"])
def test_compiles_for_tpu_without_copies_of_the_operands(target):
    """Of 0.8 GB; the states that the backward pass keeps are 34 MB, which may lie in the vector
    memory.
    """
    pytest.importorskip("libtpu")
    root = Path(__file__).parents[2]
    command = "scripts/bench/delta_rule.py", f"--device={target}", "--forms=kernel", "--json"
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2 and all(row["temporary"] < 60e6 for row in rows.values()), rows
