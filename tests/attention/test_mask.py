"""The dense meaning of masks."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import B, packed_segments, positions

from lljax.attention import causal
from lljax.attention.mask import chunked, group_of, group_start, of_keys, visible


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_count_from_the_start_of_their_document(packed):
    T, segments = 100, packed_segments(100)
    mask = causal(B, T, segments if packed else None).replace(window=30)
    places = positions(segments if packed else jnp.zeros_like(segments))
    same = places[:, :, None] // 20 == places[:, None, :] // 20
    np.testing.assert_array_equal(visible(chunked(mask, places, places, 20)), visible(mask) & same)
    assert chunked(mask, places, places, T) is mask


@pytest.mark.parametrize("group,shift", [(64, 0), (64, 32), (7, 3), (100, 40)])
def test_the_start_of_a_group_is_its_first_index(group, shift):
    mask, index = causal(1, 96).replace(group=group, shift=shift), np.arange(96)
    groups = np.asarray(group_of(mask, index))
    first = [np.flatnonzero(groups == number)[0] for number in groups]
    np.testing.assert_array_equal(np.maximum(group_start(mask, index), 0), first)


def test_new_indices_do_not_keep_the_promise_of_order():
    mask = causal(B, 8)
    assert mask.ordered and mask.replace(window=3).ordered
    assert not mask.replace(k_index=mask.k_index).ordered
    assert not of_keys(mask, lambda x: x[:, :4]).ordered
