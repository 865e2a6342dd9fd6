"""The chunked delta rule against the recurrence, token by token, and against transformers'."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from lljax.models.mixers import delta_rule
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs

B, M, R, K, V = 2, 3, 2, 8, 6


def inputs(T, seed=0, segments=None, dtype=jnp.float32, like=0.0):
    """Random tokens; like: how much the keys are alike, and then nothing is forgotten."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    k = unit(normal(B, T, M, K) * (1 - like) + like)
    decay = -np.exp(normal(B, T, M, R)) * (1 - like)
    arrays = {
        "q": unit(normal(B, T, M, K)) * K**-0.5,
        "k": k,
        "v": normal(B, T, M, R, V),
        "decay": decay,
        "beta": 1 / (1 + np.exp(-normal(B, T, M, R) - 3 * like)),
    }
    if segments is None:
        segments = np.ones((B, T), np.int32)
    wide = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    wide |= {name: wide[name].astype(dtype) for name in ("q", "k", "v")}
    return DeltaInputs(**wide, segments=jnp.asarray(segments, jnp.int32))


def empty(x, seed=None):
    shape = (B, M, R, K, V)
    state = jnp.zeros(shape)
    if seed is not None:
        state = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return DeltaCarry(state, x.segments[:, 0])


@jax.jit
def token_by_token(x, carry):
    T = x.q.shape[1]

    def step(carry, t):
        one = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1), x)
        out, carry = delta_rule.step(one, carry)
        return carry, out[:, 0]

    carry, out = jax.lax.scan(step, carry, jnp.arange(T))
    return jnp.moveaxis(out, 0, 1), carry


PACKED = np.asarray(
    [[1] * 40 + [2] * 60 + [3] + [4] * 99, [1] * 128 + [2] * 3 + [3] * 50 + [0] * 19]
)
CASES = {
    "shorter than a chunk": inputs(19),
    "not a whole number of chunks": inputs(200, seed=1),
    "a whole number of chunks": inputs(128, seed=2),
    "packed and padded": inputs(200, seed=3, segments=PACKED),
    "keys that are all alike, nothing forgotten": inputs(200, seed=4, like=0.98),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_the_recurrence_in_values_and_gradients(name, group, monkeypatch):
    monkeypatch.setattr(delta_rule, "GROUP", group)
    x, carry = CASES[name], empty(CASES[name], seed=9)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=x.v.shape), jnp.float32)
    weight *= (x.segments > 0)[..., None, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(rule, x, state):
        def loss(floats, state):
            out, after = rule(dataclasses.replace(x, **floats), carry._replace(state=state))
            return jnp.sum(out * weight) + jnp.sum(after.state**2), (out * (weight != 0), after)

        floats = {n: getattr(x, n) for n in ("q", "k", "v", "decay", "beta")}
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(floats, state)

    ours = run(delta_rule.delta_rule, x, carry.state)
    theirs = run(token_by_token, x, carry.state)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("T", [19, 130])
def test_chunks_equal_those_of_transformers(T):
    x = inputs(T, seed=6)
    out, after = delta_rule.delta_rule(x, empty(x))
    arrays = [np.asarray(a) for a in (x.q * K**0.5, x.k, x.v.reshape(B, T, M * R, V))]
    gates = [np.asarray(a).reshape(B, T, M * R) for a in (x.decay, x.beta)]
    wanted, state = modeling_qwen3_next.torch_chunk_gated_delta_rule(
        *map(torch.from_numpy, arrays + gates), output_final_state=True
    )
    np.testing.assert_allclose(out.reshape(wanted.shape), wanted, atol=1e-5)
    np.testing.assert_allclose(after.state.reshape(state.shape), state, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_within_its_rounding():
    x = inputs(200, seed=7, segments=PACKED)
    narrow = inputs(200, seed=7, segments=PACKED, dtype=jnp.bfloat16)
    (wide, _), (out, carry) = (delta_rule.delta_rule(a, empty(a)) for a in (x, narrow))
    assert out.dtype == carry.state.dtype == jnp.float32
    assert np.linalg.norm(out - wide) < 1e-2 * np.linalg.norm(wide)


def test_transitions_of_stretches_compose_to_the_state_after_both():
    """Also over the border of a document, where nothing of the state before is left."""
    x = inputs(200, seed=8, segments=PACKED)
    carry = empty(x, seed=9)
    _, wanted = delta_rule.delta_rule(x, carry)
    for cut in (30, 70, 150):
        first, then = (jax.tree.map(lambda a, s=s: a[:, s], x) for s in np.s_[:cut, cut:])
        before = DeltaCarry(delta_rule.identity(first), carry.segment)
        maps = [delta_rule.extended(first, before).state]
        before = DeltaCarry(delta_rule.identity(then), first.segments[:, -1])
        maps.append(delta_rule.extended(then, before).state)
        both = delta_rule.compose(*maps)
        state = jnp.matmul(both[..., :K], carry.state, precision="highest") + both[..., K:]
        np.testing.assert_allclose(state, wanted.state, atol=1e-5)


@pytest.mark.slow
def test_branches_start_from_the_state_after_their_prompt():
    """Two prompts with answers, one of them within a chunk, one over several, and padding; each
    answer as in a row of its own after its prompt, in values and gradients.
    """
    groups = [[(70, 20, 130, 9), (5, 3, 4)], [(140, 64, 1), (1, 30)]]  # prompt, answers ...
    T = 256
    segments, trunks, paths = np.zeros((2, T), int), np.zeros((2, T), int), []
    for b, of_row in enumerate(groups):
        at = 0
        for g, (prompt, *answers) in enumerate(of_row):
            start, trunk = at, 10 * (g + 1)
            for i, length in enumerate((prompt, *answers)):
                segments[b, at : at + length], trunks[b, at : at + length] = trunk + i, trunk
                tokens = np.r_[start : start + prompt, at : at + length] if i else None
                paths += [] if tokens is None else [(b, tokens, prompt)]
                at += length
    x = dataclasses.replace(
        inputs(T, seed=3, segments=segments), trunks=jnp.asarray(trunks, jnp.int32)
    )
    weight = jnp.asarray(np.random.default_rng(5).normal(size=x.v.shape), jnp.float32)

    def branched(floats):
        out, _ = delta_rule.delta_rule(dataclasses.replace(x, **floats), empty(x))
        return sum(jnp.sum((out * weight)[b, tokens[prompt:]]) for b, tokens, prompt in paths), out

    def alone(floats):
        total, outs = 0.0, []
        for b, tokens, prompt in paths:
            own = {name: a[b : b + 1, tokens] for name, a in floats.items()}
            row = DeltaInputs(**own, segments=jnp.ones((1, len(tokens)), jnp.int32))
            start = DeltaCarry(jnp.zeros((1, M, R, K, V)), row.segments[:, 0])
            out, _ = token_by_token(row, start)
            total += jnp.sum((out[0] * weight[b, tokens])[prompt:])
            outs.append(out[0, prompt:])
        return total, outs

    floats = {n: getattr(x, n) for n in ("q", "k", "v", "decay", "beta")}
    (ours, out), ours_grad = jax.jit(jax.value_and_grad(branched, has_aux=True))(floats)
    (theirs, outs), theirs_grad = jax.value_and_grad(alone, has_aux=True)(floats)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for (b, tokens, prompt), wanted in zip(paths, outs, strict=True):
        np.testing.assert_allclose(out[b, tokens[prompt:]], wanted, atol=1e-5)
    for name in floats:
        np.testing.assert_allclose(ours_grad[name], theirs_grad[name], atol=2e-5)
