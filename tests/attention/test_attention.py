"""Every implementation against the dense reference, values and gradients, under every kind of
mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.attention import IMPLEMENTATIONS, Mask, attend, causal, reference
from lljax.attention.attend import UnsupportedMask, best
from lljax.attention.mask import NEVER, block_kinds, chunked, visible

B, H = 3, 16
EVERYWHERE = [name for name, of in IMPLEMENTATIONS.items() if not of.platforms]


def make(T, N, K, seed=0, S=None):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=(B, length, heads, H)), jnp.float32)
        for length, heads in ((T, N), (S or T, K), (S or T, K))
    ]


def packed_segments(T, seed=0):
    """Three documents a row at uneven places; the second row ends in padding."""
    segments = np.sort(np.random.default_rng(seed).integers(1, 4, size=(B, T)), axis=1)
    segments[1, -T // 5 :] = 0
    return jnp.asarray(segments, jnp.int32)


def masks(T):
    segments = packed_segments(T)
    anchors, places = (
        jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.05),
        positions(segments),
    )
    return {
        "causal": causal(B, T),
        "packed": causal(B, T, segments),
        "window": causal(B, T, segments).replace(window=50),
        "window of one": causal(B, T).replace(window=1),
        "anchors": causal(B, T, segments).replace(window=50, anchors=anchors),
        "groups": causal(B, T, segments).replace(group=70),
        "shifted groups": causal(B, T, segments).replace(group=70, shift=35),
        "groups and window": causal(B, T).replace(group=128, shift=64, window=30),
        "chunks": chunked(causal(B, T, segments), places, places, 40),
    }


def positions(segments):
    """Of each token in its document, whose tokens lie side by side."""
    index, starts = np.arange(segments.shape[1]), np.diff(segments, axis=1, prepend=-1) != 0
    return jnp.asarray(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1), jnp.int32)


def named(implementation):
    return functools.partial(attend, implementation=implementation)


def value_and_gradients(attend, q, k, v, mask):
    weights = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)
    run = jax.jit(
        jax.value_and_grad(
            lambda q, k, v: jnp.sum(attend(q, k, v, mask, scale=0.25) * weights), (0, 1, 2)
        )
    )
    return run(q, k, v)


def with_sinks(attend, q, k, v, mask):
    """Value and gradients, of the sinks too."""
    sinks, weights = (
        jnp.asarray(np.random.default_rng(9).normal(size=x), jnp.float32)
        for x in (q.shape[2], q.shape)
    )
    return jax.jit(
        jax.value_and_grad(
            lambda q, k, v, sinks: jnp.sum(
                attend(q, k, v, mask, scale=0.25, sinks=sinks) * weights
            ),
            (0, 1, 2, 3),
        )
    )(q, k, v, sinks)


def assert_equal(got, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("kind", masks(8))
@pytest.mark.parametrize("T,N,K", [(300, 9, 3), (257, 6, 1)])
def test_equals_the_dense_reference(implementation, kind, T, N, K):
    q, k, v = make(T, N, K)
    mask = masks(T)[kind]
    assert_equal(
        value_and_gradients(named(implementation), q, k, v, mask),
        value_and_gradients(reference.attend, q, k, v, mask),
    )


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_soft_capped_scores_equal_the_dense_reference(implementation):
    q, k, v = make(150, 6, 2)
    assert_equal(
        *(
            value_and_gradients(
                functools.partial(attend, softcap=0.7), q, k, v, masks(150)["window"]
            )
            for attend in (named(implementation), reference.attend)
        )
    )


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_sinks_equal_the_dense_reference(implementation):
    mask = masks(150)["window"]
    # queries that see nothing but the sink
    mask = mask.replace(k_index=mask.k_index.at[2, :20].set(NEVER))
    assert_equal(
        *(
            with_sinks(attend, *make(150, 6, 2), mask)
            for attend in (named(implementation), reference.attend)
        )
    )


def test_what_has_no_sinks_says_so_and_the_next_is_taken():
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    assert best("gpu", q, q, causal(1, 8), sinks=jnp.zeros(2)) == "triton"
    with pytest.raises(UnsupportedMask, match="'cudnn' cannot serve sinks"):
        attend(q, q, q, causal(1, 8), scale=1.0, sinks=jnp.zeros(2), implementation="cudnn")


def test_what_cannot_cap_scores_says_so_and_the_next_is_taken():
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    assert [best("gpu", q, q, causal(1, 8), softcap) for softcap in (None, 50.0)] == [
        "cudnn",
        "triton",
    ]
    with pytest.raises(UnsupportedMask, match="'cudnn' cannot serve soft-capped scores"):
        attend(q, q, q, causal(1, 8), scale=1.0, softcap=50.0, implementation="cudnn")


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_tokens_may_be_reordered_with_their_indices(implementation):
    """The mask is decided from indices, so attention commutes with a permutation of the row."""
    T = 200
    q, k, v = make(T, 4, 2)
    mask = causal(B, T, packed_segments(T)).replace(window=60)
    order = np.random.default_rng(3).permutation(T)
    moved = Mask(
        *(x[:, order] for x in (mask.q_index, mask.k_index, mask.q_segments, mask.k_segments)),
        window=60,
    )
    run = named(implementation)
    assert_equal(
        run(*(x[:, order] for x in (q, k, v)), moved, scale=0.25),
        run(q, k, v, mask, scale=0.25)[:, order],
    )


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(implementation):
    q, k, v = make(100, 4, 2)
    mask = causal(B, 100).replace(k_index=jnp.full((B, 100), NEVER))
    value, gradients = value_and_gradients(named(implementation), q, k, v, mask)
    assert value == 0 and all(not np.any(g) for g in gradients)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_fewer_queries_than_keys(implementation):
    """A chunk of 70 queries at the end of 300 keys, as in generation."""
    q, k, v = make(70, 9, 3, S=300)
    index = jnp.broadcast_to(jnp.arange(300, dtype=jnp.int32), (B, 300))
    mask = Mask(index[:, 230:], index)
    assert_equal(
        named(implementation)(q, k, v, mask, scale=0.25),
        reference.attend(q, k, v, mask, scale=0.25),
    )


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_bfloat16_stays_near_float32(implementation):
    q, k, v = make(300, 4, 2)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = named(implementation)(*half, causal(B, 300), scale=0.25)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32), reference.attend(q, k, v, causal(B, 300), scale=0.25), atol=0.05
    )


@pytest.mark.parametrize("kind", masks(8))
def test_block_kinds_are_never_wrong(kind):
    """No visible pair in an empty block, no hidden pair in a full one; and the easy cases are
    found.
    """
    mask, size = masks(320)[kind], 32
    pairs = np.asarray(visible(mask)).reshape(B, 10, size, 10, size)
    empty, full = (np.asarray(x) for x in block_kinds(mask, size, size))
    assert not (pairs.any(axis=(0, 2, 4)) & empty).any()
    assert not (~pairs.all(axis=(0, 2, 4)) & full).any()
    assert empty[np.triu_indices(10, 1)].all()
    if kind == "causal":
        assert full[np.tril_indices(10, -1)].all()


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_count_from_the_start_of_their_document(packed):
    T, segments = 100, packed_segments(100)
    mask = causal(B, T, segments if packed else None).replace(window=30)
    places = positions(segments if packed else jnp.zeros_like(segments))
    own = places[:, :, None] // 20 == places[:, None, :] // 20
    np.testing.assert_array_equal(visible(chunked(mask, places, places, 20)), visible(mask) & own)
    assert chunked(mask, places, places, T) is mask


def test_anchors_leave_most_blocks_empty():
    """One marker every 40 tokens would keep every block active if anchors stayed where they
    stand.
    """
    from lljax.attention.blockwise import anchors_first

    T, size = 2048, 64
    mask = causal(1, T).replace(window=64, anchors=jnp.arange(T)[None] % 40 == 0)
    k = jnp.zeros((1, T, 1, 4))
    _, _, moved, _ = anchors_first(k, k, mask)
    assert not block_kinds(mask, size, size)[0][np.tril_indices(T // size)].any()
    assert block_kinds(moved, size, size)[0][np.tril_indices(T // size)].mean() > 0.7


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'flash9' is none of"):
        attend(*make(8, 2, 2), causal(B, 8), scale=1.0, implementation="flash9")
