"""Every implementation of the table against the dense reference, values and gradients.

An implementation for another platform runs as its stand-in (`attention.cases`). A case that an
implementation cannot serve must be refused with the reason.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import (
    OPTIONS,
    B,
    assert_equal,
    make,
    masks,
    packed_segments,
    runnable,
    sinks_of,
    take,
    value_and_gradients,
)

from lljax.attention import IMPLEMENTATIONS, AttentionOptions, Mask, attend, causal, reference
from lljax.attention.attend import UnsupportedAttention, check_platform, select
from lljax.attention.blockwise import FLOOR
from lljax.attention.mask import NEVER

T = 150
HEADS = {  # of each kind of mask, in the default run; all four pairs of head counts in the slow one
    "causal": (8, 8),
    "packed": (8, 2),
    "window": (9, 3),
    "window of one": (8, 8),
    "wide window": (9, 3),
    "anchors": (6, 1),
    "groups": (8, 2),
    "shifted groups": (6, 1),
    "shifted groups of one document": (9, 3),
    "groups and window": (9, 3),
    "chunks": (8, 2),
    "branches": (8, 2),
    "branches and window": (9, 3),
    "branches and anchors": (6, 1),
    "branches and shifted groups": (9, 3),
    "branches and chunks": (8, 2),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def named(request, monkeypatch) -> AttentionOptions:
    """Options that name an implementation."""
    name = f"{request.param}, runnable"
    monkeypatch.setitem(IMPLEMENTATIONS, name, runnable(request.param))
    return OPTIONS.replace(implementation=name)


def assert_equals_the_reference_or_refuses(q, k, v, mask, options, tolerance=2e-5):
    if reason := IMPLEMENTATIONS[options.implementation].refuses(q, k, mask, options):
        with pytest.raises(UnsupportedAttention, match=f"cannot serve {reason}"):
            attend(q, k, v, mask, options)
        return
    assert_equal(
        value_and_gradients(attend, q, k, v, mask, options),
        value_and_gradients(reference.attend, q, k, v, mask, options),
        tolerance,
    )


def cases():
    for kind, quick in HEADS.items():
        for heads in sorted(set(HEADS.values())):
            yield pytest.param(kind, *heads, marks=() if heads == quick else pytest.mark.slow)


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind,N,K", list(cases()))
def test_equals_the_dense_reference(named, kind, N, K):
    """At 150 tokens, no multiple of any block."""
    assert_equals_the_reference_or_refuses(*make(T, N, K), masks(T)[kind], named)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind,N,K", [("packed", 9, 3), ("anchors", 6, 1)])
def test_equals_the_dense_reference_over_several_blocks(named, kind, N, K):
    assert_equals_the_reference_or_refuses(*make(301, N, K), masks(301)[kind], named)


@pytest.mark.sample(3)
@pytest.mark.parametrize("N,K", [(6, 2), (9, 3)])
def test_soft_capped_scores(named, N, K):
    options = named.replace(softcap=0.7)
    assert_equals_the_reference_or_refuses(*make(T, N, K), masks(T)["window"], options)


def test_sinks(named):
    mask = masks(T)["window"]
    # queries that see nothing but the sink
    mask = mask.replace(k_index=mask.k_index.at[2, :20].set(NEVER))
    options = named.replace(sinks=sinks_of(9))
    assert_equals_the_reference_or_refuses(*make(T, 9, 3), mask, options)


@pytest.mark.sample(2)
def test_tokens_may_be_in_any_order(named):
    """Queries and keys permuted apart, with groups and a window; heads of 24."""
    rng = np.random.default_rng(3)
    mask = causal(B, T, packed_segments(T)).replace(window=60, group=64, shift=32)
    mask = take(mask, rng.permutation(T), rng.permutation(T))
    assert_equals_the_reference_or_refuses(*make(T, 9, 3, H=24), mask, named)


@pytest.mark.sample(2)
def test_anchors_among_tokens_in_any_order(named):
    mask = masks(T)["anchors"].replace(window=100)
    order = np.random.default_rng(3).permutation(T)
    assert_equals_the_reference_or_refuses(*make(T, 4, 2), take(mask, order, order), named)


@pytest.mark.sample(2)
def test_fewer_queries_than_keys(named):
    """70 queries at the end of 300 keys, as in generation; the first 130 keys are padding."""
    index = jnp.broadcast_to(jnp.arange(300, dtype=jnp.int32), (B, 300))
    mask = Mask(index[:, 230:], jnp.where(index < 130, NEVER, index))
    assert_equals_the_reference_or_refuses(*make(70, 9, 3, S=300), mask, named)


@pytest.mark.sample(2)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(named):
    q, k, v = make(T, 4, 2)
    mask = causal(B, T).replace(k_index=jnp.full((B, T), NEVER).at[0].set(jnp.arange(T)))
    row = IMPLEMENTATIONS[named.implementation]
    if row.refuses(q, k, mask, named):
        return
    out, gradients = value_and_gradients(attend, q, k, v, mask, named)
    if row.forward is not None:
        _, lse = row.forward(q, k, v, mask, scale=0.25)
        assert np.all(lse[1:] == np.float32(FLOOR)) and np.all(lse[0] > FLOOR)
    assert not np.any(out[1:]) and np.any(out[0])
    assert all(np.any(g[0]) and not np.any(g[1:]) for g in gradients[:3])


@pytest.mark.sample(3)
def test_bfloat16_stays_near_float32(named):
    q, k, v = make(T, 4, 2)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    _, gradients = value_and_gradients(attend, *half, causal(B, T), named)
    _, wanted = value_and_gradients(reference.attend, q, k, v, causal(B, T))
    for got, want in zip(gradients[:3], wanted[:3], strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)


@pytest.mark.sample(3)
def test_parts_of_the_keys_add_up_as_a_ring_adds_them(named):
    """Outputs merged by their log-sum-exp; gradients of the parts from the merged results."""
    row = IMPLEMENTATIONS[named.implementation]
    if row.forward is None:
        return
    q, k, v = make(T, 4, 2)
    mask = causal(B, T, packed_segments(T))
    parts = [
        (k[:, part], v[:, part], take(mask, slice(None), part))
        for part in (slice(80, None), slice(0, 80))
    ]
    outs, sums = zip(*(row.forward(q, *part, scale=0.25) for part in parts), strict=True)
    lse = jnp.logaddexp(*sums)
    out = sum(out * jnp.exp(part - lse)[..., None] for out, part in zip(outs, sums, strict=True))
    d_out = make(T, 4, 2, seed=1)[0]
    (dq1, dk1, dv1), (dq0, dk0, dv0) = (
        row.backward(q, *part, (out, lse), d_out, scale=0.25) for part in parts
    )
    wanted, pull_back = jax.vjp(lambda *x: reference.attend(*x, mask, OPTIONS), q, k, v)
    assert_equal(
        (out, dq0 + dq1, jnp.concatenate([dk0, dk1], axis=1), jnp.concatenate([dv0, dv1], axis=1)),
        (wanted, *pull_back(d_out)),
    )


# ---------------------------------------------------------------- the choice
def test_an_unknown_name_is_refused():
    with pytest.raises(UnsupportedAttention, match="='flash9' is none of auto, direct, tpu"):
        attend(*make(8, 2, 2), causal(B, 8), OPTIONS.replace(implementation="flash9"))


@pytest.mark.parametrize("name", [name for name, row in IMPLEMENTATIONS.items() if row.platforms])
def test_another_platform_is_refused(name):
    options = OPTIONS.replace(implementation=name, platform="cpu")
    for refused in (
        lambda: attend(*make(8, 2, 2), causal(B, 8), options),
        lambda: check_platform(name, "cpu"),
    ):
        with pytest.raises(UnsupportedAttention, match=f"='{name}' cannot serve devices of .* cpu"):
            refused()
    check_platform(name, IMPLEMENTATIONS[name].platforms[0])
    check_platform("auto", "cpu")


@pytest.mark.parametrize(
    "changes,reason",
    [({"sinks": jnp.zeros(2)}, "sinks"), ({"softcap": 50.0}, "soft-capped scores")],
)
def test_cudnn_refuses_what_it_cannot_compute_and_triton_is_taken(changes, reason):
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    options = OPTIONS.replace(platform="gpu", **changes)
    assert select(q, q, causal(1, 8), OPTIONS.replace(platform="gpu")) == "cudnn"
    assert select(q, q, causal(1, 8), options) == "triton"
    with pytest.raises(UnsupportedAttention, match=f"='cudnn' cannot serve {reason}"):
        attend(q, q, q, causal(1, 8), options.replace(implementation="cudnn"))


@pytest.mark.parametrize("name,platform", [("tpu", "tpu"), ("triton", "cuda")])
def test_kernels_lower_for_a_platform_that_is_not_here(name, platform):
    """Forward and backward, with every kind of limit in the mask."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    options = OPTIONS.replace(
        implementation=name, platform={"cuda": "gpu"}.get(platform, platform), softcap=30.0
    )
    index, anchors = array(1, 4096, dtype=jnp.int32), array(1, 4096, dtype=jnp.bool_)
    mask = Mask(index, index, index, index, anchors, index, window=512, group=2048)
    operands = array(1, 4096, 8, 128), array(1, 4096, 2, 128), array(1, 4096, 2, 128)

    def loss(q, k, v, mask):
        return attend(q, k, v, mask, options).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*operands, mask)
    text = gradient.lower(lowering_platforms=(platform,)).as_text()
    assert text.count({"tpu": "tpu_custom_call", "triton": "__gpu$xla.gpu.triton"}[name]) >= 3
