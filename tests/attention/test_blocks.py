"""The arithmetic of blocks against dense masks, and the blocks that every tiled implementation
visits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import B, make, masks, random_mask, take

from lljax.attention import blockwise, causal, gpu, tpu_visits
from lljax.attention.blocks import (
    anchors_first,
    block_pairs,
    compared,
    extremes,
    in_row_order,
    span,
    token_visible,
)
from lljax.attention.mask import pad, visible
from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import zigzag

T, SIZE = 157, 32  # no multiple
PADDED = 160
SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed >= 8 else ()) for seed in range(40)]


def dense_pairs(mask):
    """(any, all) of the dense mask in every pair of blocks, bool [B, I, J]."""
    shape = [B, mask.q_index.shape[1] // SIZE, SIZE, mask.k_index.shape[1] // SIZE, SIZE]
    pairs = np.asarray(visible(mask)).reshape(shape)
    return pairs.any((2, 4)), pairs.all((2, 4))


def blockwise_visits(mask):
    """The pairs of blocks that `blockwise` visits, with and without a mask."""

    class Call:
        bq = bk = SIZE

    Call.mask = mask
    visit, J = blockwise._visitor(Call), mask.k_index.shape[1] // SIZE
    visited, full = (np.zeros((mask.q_index.shape[1] // SIZE, J), bool) for _ in range(2))
    for i in range(len(visited)):

        def record(j, masked, carry):
            return carry.at[j].set(2 if masked else 1)

        kinds = np.asarray(visit(i, record, jnp.zeros(J, int)))
        visited[i], full[i] = kinds > 0, kinds == 1
    return visited, full


def gpu_visits(mask):
    """(visited, full) of the loops over keys [B, I, J] and of the loops over queries [B, J, I]."""
    S, Q = mask.k_index.shape[1], mask.q_index.shape[1]
    q, k, v = make(Q, 1, 1, S=S)
    call = gpu.Call(q, k, v, mask, blocks=(SIZE, SIZE), interpret=True)
    results = []
    for spans, others in ((call.spans_of_queries(), S), (call.spans_of_keys(), Q)):
        a0, a1, start, f0, f1, stop = np.moveaxis(np.asarray(spans), 1, 0)[..., None]
        place = np.arange(cdiv(others, SIZE))
        visited = (a0 <= place) & (place < a1) | (start <= place) & (place < stop)
        results.append((visited, (f0 <= place) & (place < f1)))
    return results


def tpu_visit_table(mask):
    """(Visits, pairs visited [B, here, there]) of queries to keys, and of keys to queries."""
    q, k = (extremes(rows, SIZE) for rows in compared(mask))
    results = []
    for visits in (tpu_visits.of_queries(q, k), tpu_visits.of_keys(q, k)):
        table = np.asarray(visits.table)
        pairs = np.zeros((B, visits.starts["count"][1], visits.starts["order"][1]), bool)
        counts, rank = visits.starts["count"][0], jax.jit(visits.index)
        for b, n in np.ndindex(pairs.shape[:2]):
            for step in range(table[counts + b * pairs.shape[1] + n]):
                pairs[b, n, int(rank(table, b, n, step))] = True
        results.append((visits, pairs))
    return results


def moved(mask):
    """The mask with its anchors first, if they count."""
    if mask.window is not None and mask.anchors is not None:
        k = jnp.zeros((*mask.k_index.shape, 1, 1))
        mask = anchors_first(k, k, mask)[2]
    return mask


@pytest.mark.parametrize("seed", SEEDS)
def test_the_integers_compared_are_the_mask(seed):
    mask = random_mask(seed, T)
    q, k = compared(mask)
    got = token_visible(
        {name: x[:, :, None] for name, x in q.items()},
        {name: x[:, None, :] for name, x in k.items()},
    )
    np.testing.assert_array_equal(got, visible(mask))


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks_lose_no_visible_pair(seed):
    """No visible pair in a block that is not visited, no hidden pair in a block without a mask."""
    mask = moved(random_mask(seed, T))
    padded = pad(mask, PADDED, PADDED)
    some, every = dense_pairs(padded)
    active, full = (np.asarray(x) for x in block_pairs(padded, SIZE, SIZE))
    assert not (some & ~active).any() and not (full & ~every).any()
    visited, full = blockwise_visits(padded)
    assert not (some.any(0) & ~visited).any() and not (full & ~every.all(0)).any()
    if mask.anchors is None or mask.window is None:  # else it moves the anchors once more
        over_keys, over_queries = gpu_visits(mask)
        for (visited, full), axes in ((over_keys, (0, 1, 2)), (over_queries, (0, 2, 1))):
            assert not (some.transpose(axes) & ~visited).any()
            assert not (full & ~every.transpose(axes)).any()
    (_, by_queries), (_, by_keys) = tpu_visit_table(padded)
    assert not (some & ~by_queries).any() and not (some & ~by_keys.swapaxes(1, 2)).any()


@pytest.mark.parametrize("kind", masks(8))
def test_the_loops_of_the_gpu_visit_what_is_visible(kind):
    mask = masks(PADDED)[kind]
    some, every = dense_pairs(moved(mask))
    over_keys, over_queries = gpu_visits(mask)
    for (visited, full), axes in ((over_keys, (0, 1, 2)), (over_queries, (0, 2, 1))):
        assert not (some.transpose(axes) & ~visited).any()
        assert not (full & ~every.transpose(axes)).any()
        # in order and unpacked: no loop is too long
        if kind in ("causal", "window of one", "groups and window"):
            assert (some.transpose(axes) == visited).all()
            assert (every.transpose(axes) == full).all()


@pytest.mark.parametrize(
    "changes", [{}, {"window": 40}, {"group": 64}, {"group": 64, "shift": 32}], ids=str
)
def test_rows_of_one_document_visit_exactly_the_visible_blocks(changes):
    mask = causal(B, PADDED).replace(**changes)
    some, every = dense_pairs(mask)
    np.testing.assert_array_equal(block_pairs(mask, SIZE, SIZE), (some, every))
    np.testing.assert_array_equal(blockwise_visits(mask), (some[0], every[0]))
    over_keys, over_queries = gpu_visits(mask)
    np.testing.assert_array_equal(over_keys[0], some)
    np.testing.assert_array_equal(over_queries[0], some.swapaxes(1, 2))
    (_, by_queries), (_, by_keys) = tpu_visit_table(mask)
    np.testing.assert_array_equal(by_queries, some)
    np.testing.assert_array_equal(by_keys, some.swapaxes(1, 2))


@pytest.mark.parametrize("changes", [{}, {"window": 64}, {"group": 128}])
def test_no_empty_block_is_visited_on_tpu_in_zigzag_order(changes):
    order = np.asarray(zigzag(jnp.arange(512), 4))
    mask = take(causal(B, 512).replace(**changes), order, order)
    some, _ = dense_pairs(mask)
    (by_queries, visited), (by_keys, visited_by_keys) = tpu_visit_table(mask)
    np.testing.assert_array_equal(visited, some)
    np.testing.assert_array_equal(visited_by_keys, some.swapaxes(1, 2))
    assert by_queries.longest == some.sum(2).max() and by_keys.longest == some.sum(1).max()


def test_anchors_leave_most_blocks_empty():
    """One marker every 40 tokens would keep every block active if anchors stayed in place."""
    T, size = 2048, 64
    mask = causal(1, T).replace(window=64, anchors=jnp.arange(T)[None] % 40 == 0)
    below = np.tril_indices(T // size)
    assert np.asarray(block_pairs(mask, size, size)[0])[0][below].all()
    assert np.asarray(block_pairs(moved(mask), size, size)[0])[0][below].mean() < 0.3


def test_keys_come_back_into_the_order_of_the_row():
    _, k, v = make(T, 2, 2)
    mask = masks(T)["anchors"]
    k_moved, v_moved, changed, places = anchors_first(k, v, mask)
    np.testing.assert_array_equal(in_row_order(k_moved, places), k)
    np.testing.assert_array_equal(in_row_order(v_moved, places), v)
    assert np.diff(np.asarray(changed.anchors, int), axis=1).max() <= 0


@pytest.mark.parametrize(
    "active,wanted", [([0, 0, 0], (0, 0)), ([0, 1, 0], (1, 2)), ([1, 0, 1], (0, 3))]
)
def test_a_span_is_the_shortest_range_that_holds_every_active_block(active, wanted):
    assert tuple(int(x) for x in span(jnp.asarray(active, bool))) == wanted
