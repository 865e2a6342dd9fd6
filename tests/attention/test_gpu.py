"""The Triton kernels against the dense reference, interpreted where there is no GPU; and compiled
for GPUs that are not there.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import B, assert_equal, make, masks, packed_segments, with_sinks

from lljax.attention import Mask, attend, causal, gpu, reference
from lljax.attention.attend import Implementation
from lljax.attention.mask import NEVER, visible

HEADS = [(8, 8), (8, 2), (9, 3), (6, 1)]
T = 300  # no multiple of a block, and long enough for full blocks
INTERPRET = jax.default_backend() != "gpu"
FORWARD, BACKWARD = (functools.partial(f, interpret=INTERPRET) for f in (gpu.forward, gpu.backward))
TRITON = functools.partial(attend, implementation=Implementation(FORWARD, BACKWARD))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, mask):
    weights = jax.random.normal(jax.random.key(9), q.shape)
    loss = lambda q, k, v: jnp.sum(attend(q, k, v, mask, scale=0.25).astype(jnp.float32) * weights)
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def assert_equals_reference(attend, q, k, v, mask):
    assert_equal(
        value_and_gradients(attend, q, k, v, mask),
        value_and_gradients(reference.attend, q, k, v, mask),
    )


def zigzag(tree, T):
    """Tokens [B, T, ...] in the order of context parallelism: full blocks with others between
    them.
    """
    parts = np.array_split(np.arange(T), 10)
    order = np.concatenate([parts[i] for i in (0, 9, 1, 8, 2, 7, 3, 6, 4, 5)])
    return jax.tree.map(lambda x: x[:, order], tree)


def all_masks(T):
    # blocks cut at the left, full, cut at the right
    wide = causal(B, T, packed_segments(T)).replace(window=200)
    # part of a block
    sinks = causal(B, T).replace(window=50, anchors=jnp.broadcast_to(jnp.arange(T) < 20, (B, T)))
    return masks(T) | {"wide window": wide, "sinks": sinks, "zigzag": zigzag(causal(B, T), T)}


QUICK = {
    "causal": (8, 8),
    "packed": (8, 2),
    "wide window": (9, 3),
    "anchors": (6, 1),
    "shifted groups": (9, 3),
    "groups and window": (6, 1),
    "chunks": (8, 2),
}


def cases():
    for kind in all_masks(8):
        for heads in HEADS:
            yield pytest.param(
                kind, *heads, marks=() if QUICK.get(kind) == heads else pytest.mark.slow
            )


# ---------------------------------------------------------------- Triton
@pytest.mark.parametrize("kind,N,K", list(cases()))
def test_triton_equals_the_dense_reference(kind, N, K):
    assert_equals_reference(TRITON, *make(T, N, K), all_masks(T)[kind])


def test_triton_with_sinks():
    assert_equal(
        *(with_sinks(f, *make(T, 4, 2), masks(T)["window"]) for f in (TRITON, reference.attend))
    )


def test_triton_with_soft_capped_scores():
    q, k, v = make(T, 4, 2)
    assert_equal(
        *(
            value_and_gradients(functools.partial(attend, softcap=0.7), q, k, v, masks(T)["window"])
            for attend in (TRITON, reference.attend)
        )
    )


def test_triton_takes_tokens_in_any_order():
    """Queries and keys permuted apart, with a group and a window; a head size that is no power of
    two.
    """
    rng = np.random.default_rng(3)
    q, k, v = (jnp.concatenate([x, x[..., :8]], axis=-1) for x in make(T, 9, 3))
    here, there = rng.permutation(T), rng.permutation(T)
    mask = causal(B, T, packed_segments(T)).replace(window=60, group=128, shift=64)
    moved = mask.replace(
        q_index=mask.q_index[:, here],
        q_segments=mask.q_segments[:, here],
        k_index=mask.k_index[:, there],
        k_segments=mask.k_segments[:, there],
    )
    assert_equals_reference(TRITON, q[:, here], k[:, there], v[:, there], moved)


def test_triton_with_anchors_in_zigzag_order():
    operands = make(T, 4, 2), masks(T)["anchors"].replace(window=200)
    (q, k, v), mask = zigzag(operands, T)
    assert_equals_reference(TRITON, q, k, v, mask)


def test_triton_with_more_keys_than_queries_some_of_them_never_seen():
    """A chunk of 70 queries at the end of a row, after keys that are padding."""
    q, k, v = make(70, 6, 1, S=T)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    mask = Mask(index[:, T - 70 :], jnp.where(index < 130, NEVER, index))
    assert_equals_reference(TRITON, q, k, v, mask)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = make(T, *HEADS[0])
    mask = causal(B, T).replace(k_index=jnp.full((B, T), NEVER, jnp.int32))
    value, gradients = value_and_gradients(TRITON, q, k, v, mask)
    assert value == 0 and all(not np.any(g) for g in gradients)


def test_triton_in_bfloat16_stays_near_float32():
    q, k, v = make(T, 4, 2)
    mask = causal(B, T)
    _, got = value_and_gradients(TRITON, *(x.astype(jnp.bfloat16) for x in (q, k, v)), mask)
    _, wanted = value_and_gradients(reference.attend, q, k, v, mask)
    for a, b in zip(got, wanted):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max()))


def test_parts_of_the_keys_sum_to_the_whole():
    """What a ring does: outputs merged by their log-sum-exp, gradients of the parts from the merged
    ones.
    """
    q, k, v = make(T, 4, 2)
    mask, weights = causal(B, T), jax.random.normal(jax.random.key(9), q.shape)
    halves = [
        (k[:, at], v[:, at], mask.replace(k_index=mask.k_index[:, at]))
        for at in (slice(0, T // 2), slice(T // 2, T))
    ]
    forward, backward = (jax.jit(functools.partial(f, scale=0.25)) for f in (FORWARD, BACKWARD))
    outs, lses = zip(*(forward(q, *half) for half in halves))
    lse = jnp.logaddexp(*lses)
    out = sum(out * jnp.exp(part - lse)[..., None] for out, part in zip(outs, lses))
    dqs, dks, dvs = zip(*(backward(q, *half, out, lse, weights) for half in halves))
    _, wanted = value_and_gradients(reference.attend, q, k, v, mask)
    assert_equal((sum(dqs), jnp.concatenate(dks, axis=1), jnp.concatenate(dvs, axis=1)), wanted)


def loops_over(spans):
    """The blocks of the other kind that a block's loops visit, and those taken for full: bool [B,
    blocks, others].
    """
    a0, a1, start, f0, f1, stop = np.moveaxis(np.asarray(spans), 1, 0)[..., None]
    place = np.arange(64)
    within = lambda low, high: (low <= place) & (place < high)
    return within(a0, a1) | within(start, stop), within(f0, f1)


@pytest.mark.parametrize("kind", all_masks(8))
def test_loops_visit_what_is_visible_and_take_for_full_what_is(kind, size=32, T=320):
    q, k, v = make(T, 2, 2)
    mask = all_masks(T)[kind]
    call = gpu._Call(q, k, v, mask, size, size, True)
    if call.places is not None:
        mask = gpu.anchors_first(k, v, mask)[2]
    pairs = np.asarray(visible(mask)).reshape(B, 10, size, 10, size)
    for spans, axes in ((call.spans_of_queries(), (0, 1, 2)), (call.spans_of_keys(), (0, 2, 1))):
        visited, full = (x[..., :10] for x in loops_over(spans))
        some, all_ = pairs.any((2, 4)).transpose(axes), pairs.all((2, 4)).transpose(axes)
        assert not (some & ~visited).any() and not (full & ~all_).any()
        # in order and unpacked: no loop is too long
        if kind in ("causal", "window of one", "groups and window"):
            assert (some == visited).all() and (full == all_).all()


# ---------------------------------------------------------------- compiled for GPUs that are not
# there
COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from lljax.attention import Mask, attend
from lljax.hardware.targets import target
from lljax.parallel.sharding import make_mesh, replicated

one = replicated(make_mesh(devices=target(sys.argv[1]).devices()))

def temp(T, N=32, K=8, H=128):
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
    index = array(1, T, dtype=jnp.int32)
    loss = lambda q, k, v, mask: attend(q, k, v, mask, scale=H ** -0.5, implementation="triton").astype(jnp.float32).sum()
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    compiled = step.lower(array(1, T, N, H), array(1, T, K, H), array(1, T, K, H), Mask(index, index)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):          # Pallas asks it what kind of GPU there is
    print(json.dumps([temp(32768), temp(65536)]))
"""


def cuda_plugin() -> int | None:
    """The major version of CUDA that jax's plugin here is for."""
    return next(
        (major for major in (13, 12) if importlib.util.find_spec(f"jax_cuda{major}_plugin")), None
    )


@pytest.mark.slow
@pytest.mark.skipif(cuda_plugin() is None, reason="jax has no CUDA plugin here")
@pytest.mark.parametrize("device", ["h100-80g", "a10-24g"])
def test_compiles_for_a_gpu_in_memory_that_grows_with_T_only(device):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": str(Path(gpu.__file__).parents[2]),
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, device], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    short, long = json.loads(run.stdout.splitlines()[-1])
    # three arrays like q; scores of one head would be 16 of them
    assert short < 3 * 32768 * 32 * 128 * 2
    assert long < 2.05 * short
