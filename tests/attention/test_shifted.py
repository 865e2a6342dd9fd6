"""Shifted sparse attention against ten dense lines with one mask per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import OPTIONS, B, H, assert_equal, make, packed_segments

from lljax.attention import attend_shifted, causal
from lljax.attention.blocks import block_pairs
from lljax.attention.pattern import Groups

HEADS = [(8, 8), (8, 2), (9, 3), (6, 1)]


def dense_shifted(q, k, v, segments, groups):
    """LongLoRA section 3.2, written with an explicit group number per head and position."""
    T, N = q.shape[1:3]
    position = np.arange(T)
    plain, moved = position // groups.size, (position + groups.shift) // groups.size
    number = np.stack([plain if head < N // 2 else moved for head in range(N)])
    see = (number[:, :, None] == number[:, None, :]) & (position[:, None] >= position)
    see = see[None] & (segments[:, None, :, None] == segments[:, None, None, :])
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(see, jnp.einsum("BTNH,BSNH->BNTS", q, k) * 0.25, -1e30)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.sample(5)
@pytest.mark.parametrize("N,K", HEADS)
@pytest.mark.parametrize(
    "T,groups", [(256, Groups(64, 32)), (250, Groups(64, 32)), (131, Groups(66, 33))], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_one_dense_mask_per_head(N, K, T, groups, packed):
    assert_equals_one_dense_mask_per_head(N, K, T, groups, packed)


@pytest.mark.parametrize("N,K", [(8, 2), (9, 3)])
def test_unshifted_groups_are_the_same_for_every_head(N, K):
    """LongLoRA's ablation of the shift."""
    assert_equals_one_dense_mask_per_head(N, K, 131, Groups(66, 0), True)


def assert_equals_one_dense_mask_per_head(N, K, T, groups, packed):
    q, k, v = make(T, N, K)
    segments = packed_segments(T) if packed else jnp.ones((B, T), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, N, H)), jnp.float32)

    def gradients(attend):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: jnp.sum(attend(q, k, v) * weights), (0, 1, 2))
        )(q, k, v)

    mask = causal(B, T, segments)
    assert_equal(
        gradients(lambda q, k, v: attend_shifted(q, k, v, mask, groups, OPTIONS)),
        gradients(lambda q, k, v: dense_shifted(q, k, v, segments, groups)),
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("N,K", HEADS)
def test_never_sees_the_future(N, K):
    """With a roll the first half-group of half the heads would see the end of the row."""
    T = 96
    q, k, v = make(T, N, K)
    changed = [x.at[:, T - 20 :].add(1.0) for x in (q, k, v)]

    def run(q, k, v):
        return attend_shifted(q, k, v, causal(B, T), Groups(32, 16), OPTIONS)

    np.testing.assert_array_equal(run(q, k, v)[:, : T - 20], run(*changed)[:, : T - 20])


def test_shifted_heads_connect_neighboring_groups():
    """The purpose of the shift: a group reads the second half of the group before it."""
    q, k, v = make(64, 4, 2)
    changed = v.at[:, 30].add(1.0)  # the last tokens of group [0, 32), read by [16, 48)

    def run(v):
        return attend_shifted(q, k, v, causal(B, 64), Groups(32, 16), OPTIONS)

    difference = np.abs(run(changed) - run(v)).max(axis=(0, 3))
    assert difference[40, 2:].min() > 0 and difference[40, :2].max() == 0


def test_work_is_a_quarter_of_full_attention():
    """Pairs of blocks visited at G = T / 4, over the two halves of the heads, against full causal
    attention.
    """
    T, size = 8192, 128

    def visited(mask):
        return int(block_pairs(mask, size, size)[0].sum())

    mask = causal(1, T)
    halves = [
        visited(mask.replace(group=T // 4)),
        visited(mask.replace(group=T // 4, shift=T // 8)),
    ]
    assert 0.2 < np.mean(halves) / visited(mask) < 0.28
