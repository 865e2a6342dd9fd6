"""Operands and masks that the tests of attention share, and every implementation in a form that
runs on this machine.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lljax.attention import IMPLEMENTATIONS, AttentionOptions, Mask, causal, cudnn, direct, gpu, tpu
from lljax.attention.attend import Implementation
from lljax.attention.mask import NEVER, branched, chunked

B, H = 3, 16
OPTIONS = AttentionOptions(scale=0.25)

# Implementations for a platform that is not here: the kernels interpreted, or the same call of jax
# with another backend. And one that only refuses many queries because others are faster for them.
STAND_INS = {
    "direct": Implementation(whole=direct.attend),
    "tpu": Implementation(
        functools.partial(tpu.forward, interpret=True, blocks=(32, 64)),
        functools.partial(tpu.backward, interpret=True, blocks=(32, 64)),
    ),
    "triton": Implementation(
        functools.partial(gpu.forward, interpret=True),
        functools.partial(gpu.backward, interpret=True),
    ),
    "cudnn": Implementation(
        whole=functools.partial(cudnn.attend, implementation="xla"),
        # it computes in float32 too
        refuses=lambda q, k, mask, options: cudnn.refuses(
            jax.ShapeDtypeStruct(q.shape, jnp.bfloat16), k, mask, options
        ),
    ),
}


def runnable(name: str) -> Implementation:
    """The row of the table, or its stand-in on another platform."""
    row = IMPLEMENTATIONS[name]
    here = not row.platforms or jax.default_backend() in row.platforms
    return row if here and name != "direct" else STAND_INS[name]


def make(T, N, K, seed=0, S=None, H=H):
    """q [B, T, N, H], k and v [B, S, K, H]."""
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


def positions(segments):
    """The place of each token in its document, whose tokens lie side by side."""
    index, starts = np.arange(segments.shape[1]), np.diff(segments, axis=1, prepend=-1) != 0
    return jnp.asarray(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1), jnp.int32)


def branches_of(segments, seed=0):
    """A trunk and up to five branches, of uneven lengths, in each document but the padding; and the
    place of each token in its own sequence.
    """
    rng, segments = np.random.default_rng(seed), np.asarray(segments)
    branches, places = np.zeros_like(segments), np.zeros_like(segments)
    for row, segment in np.ndindex(len(segments), segments.max()):
        here = np.flatnonzero(segments[row] == segment + 1)
        if len(here):
            trunk = int(rng.integers(1, len(here) + 1))
            branch = np.sort(rng.integers(1, 6, size=len(here) - trunk))
            starts = np.searchsorted(branch, branch)
            branches[row, here[trunk:]] = branch
            places[row, here[:trunk]] = np.arange(trunk)
            places[row, here[trunk:]] = trunk + np.arange(len(branch)) - starts
    return jnp.asarray(branches, jnp.int32), jnp.asarray(places, jnp.int32)


def masks(T):
    segments = packed_segments(T)
    places = positions(segments)
    anchors = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.05)
    branches, shared = branches_of(segments)
    branching = branched(causal(B, T, segments), shared, branches)
    return {
        "causal": causal(B, T),
        "packed": causal(B, T, segments),
        "window": causal(B, T, segments).replace(window=50),
        "window of one": causal(B, T).replace(window=1),
        "wide window": causal(B, T, segments).replace(window=200),
        "anchors": causal(B, T, segments).replace(window=50, anchors=anchors),
        "groups": causal(B, T, segments).replace(group=70),
        "shifted groups": causal(B, T, segments).replace(group=70, shift=35),
        "shifted groups of one document": causal(B, T).replace(group=70, shift=35),
        "groups and window": causal(B, T).replace(group=128, shift=64, window=30),
        "chunks": chunked(causal(B, T, segments), places, places, 40),
        "branches": branching,
        "branches and window": branching.replace(window=20),
        "branches and anchors": branching.replace(window=20, anchors=anchors),
        "branches and shifted groups": branching.replace(group=30, shift=15),
        "branches and chunks": chunked(branching, shared, shared, 20),
    }


def random_mask(seed: int, T: int) -> Mask:
    """Any combination of documents, padding, branches, window, anchors, groups and chunks, in any
    order.
    """
    rng = np.random.default_rng(seed)

    def maybe(value, share=0.5):
        return value if rng.random() < share else None

    segments, places = maybe(packed_segments(T, seed)), None
    mask = causal(B, T, segments)
    if segments is not None and rng.random() < 0.5:
        branches, places = branches_of(segments, seed)
        mask = branched(mask, places, branches)
    mask = mask.replace(window=maybe(int(rng.integers(1, T))))
    if mask.window is not None:
        mask = mask.replace(anchors=maybe(jnp.asarray(rng.random((B, T)) < rng.random() / 4)))
    if rng.random() < 0.5:
        group = int(rng.integers(1, T))
        mask = mask.replace(group=group, shift=int(rng.integers(0, group)))
    if rng.random() < 0.3:
        if mask.q_trunks is None:
            places = positions(jnp.zeros((B, T), jnp.int32) if segments is None else segments)
        mask = chunked(mask, places, places, int(rng.integers(1, T)))
    if rng.random() < 0.3:  # keys that are padding
        mask = mask.replace(k_index=jnp.where(rng.random((B, T)) < 0.2, NEVER, mask.k_index))
    if rng.random() < 0.4:
        mask = take(mask, rng.permutation(T), rng.permutation(T))
    return mask


def take(mask: Mask, q_order, k_order) -> Mask:
    """The mask with its queries and its keys in another order, or fewer of them."""

    def of(x, order):
        return None if x is None else x[:, order]

    return mask.replace(
        q_index=of(mask.q_index, q_order),
        q_segments=of(mask.q_segments, q_order),
        q_trunks=of(mask.q_trunks, q_order),
        k_index=of(mask.k_index, k_order),
        k_segments=of(mask.k_segments, k_order),
        anchors=of(mask.anchors, k_order),
    )


def value_and_gradients(attend, q, k, v, mask, options=OPTIONS):
    """The output, and the gradients of a weighted sum of it by q, k, v and the sinks."""
    weights = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)

    @jax.jit
    def run(*operands):
        out, pull_back = jax.vjp(
            lambda q, k, v, sinks: attend(q, k, v, mask, options.replace(sinks=sinks)), *operands
        )
        return out, pull_back(weights.astype(out.dtype))

    return run(q, k, v, options.sinks)


def sinks_of(N: int):
    return jnp.asarray(np.random.default_rng(9).normal(size=N), jnp.float32)


def assert_equal(got, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
