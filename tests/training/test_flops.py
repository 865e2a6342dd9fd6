"""The counted arithmetic against what the compiler counts for the same program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.attention import causal
from lljax.attention.mask import visible
from lljax.models.layers import AttentionPattern
from lljax.training.flops import visible_pairs


@pytest.mark.parametrize("pattern,window", [
    (AttentionPattern(), None), (AttentionPattern(), 20), (AttentionPattern("window", window=24, anchors=3), None)])
def test_visible_pairs_are_those_of_the_mask(pattern, window):
    T = 96
    limit = min((w for w in (window, pattern.window or None) if w), default=None)
    anchors = jnp.arange(T)[None] < pattern.anchors if pattern.anchors else None
    mask = causal(1, T).replace(window=limit, anchors=anchors)
    counted = int(np.asarray(visible(mask)).sum())
    assert abs(visible_pairs(pattern, T, window) - counted) <= 0.02 * counted


def test_groups_count_the_average_of_both_halves_of_the_heads():
    T, G = 96, 16
    halves = [int(jax.device_get(visible(causal(1, T).replace(group=G, shift=shift)).sum())) for shift in (0, G // 2)]
    assert abs(visible_pairs(AttentionPattern("shifted", group=G), T) - np.mean(halves)) <= 0.05 * np.mean(halves)
