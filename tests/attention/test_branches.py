"""Answers that share a prompt: every implementation and context-parallel mode against a row for
each answer, values and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import (
    OPTIONS,
    assert_equal,
    make,
    runnable,
    sinks_of,
    value_and_gradients,
)
from attention.test_blocks import gpu_visits, tpu_visit_table
from attention.test_context_parallel import reorder, run

from lljax.attention import (
    IMPLEMENTATIONS,
    AttentionOptions,
    attend,
    attend_shifted,
    causal,
    reference,
)
from lljax.attention.attend import UnsupportedAttention, select
from lljax.attention.blocks import block_pairs, compared
from lljax.attention.context_parallel import MODES, attend_parallel, choose
from lljax.attention.mask import branched, chunked, visible
from lljax.attention.pattern import Groups
from lljax.attention.streamed import tile_reach
from lljax.errors import ConfigError
from lljax.parallel.sharding import Layout, make_mesh

T = 150
ROWS = (  # of each group: the tokens of its trunk and of its answers; the rest is padding
    ((40, (13, 1, 30)), (1, (7, 20)), (25, ())),
    ((9, (50, 3)), (30, (5, 5, 5)), (20, (2,))),
    ((70, (40, 17, 1)), (3, (1, 1)), (0, ())),
)
HEADS = [(8, 2), (9, 3), (6, 1)]
KINDS = {  # changes of the mask
    "full": {},
    "window": {"window": 20},
    "groups": {"group": 32, "shift": 16},
    "anchors": {"window": 20, "anchors": True},
    "chunks": {"chunks": 25},
}


def layout_of_rows(rows, T):
    """Segments, branches and positions [B, T] of rows of groups."""
    arrays = np.zeros((3, len(rows), T), np.int32)
    for row, groups in enumerate(rows):
        start = 0
        for segment, (trunk, answers) in enumerate(groups, 1):
            for branch, length in enumerate((trunk, *answers)):
                stop, first = start + length, trunk if branch else 0
                arrays[:2, row, start:stop] = [[segment], [branch]]
                arrays[2, row, start:stop] = np.arange(first, first + length)
                start = stop
    return tuple(jnp.asarray(x) for x in arrays)


def sequences_of(rows):
    """(row, places of the tokens in the row) of each answer after its prompt, and of each prompt
    without answers.
    """
    for row, groups in enumerate(rows):
        start = 0
        for trunk, answers in groups:
            prompt, start = np.arange(start, start + trunk), start + trunk
            if not answers and trunk:
                yield row, prompt
            for length in answers:
                yield row, np.concatenate([prompt, np.arange(start, start + length)])
                start += length


def anchors_of(rows, T):
    return jnp.asarray(np.random.default_rng(1).random((len(rows), T)) < 0.1)


def packed_mask(rows, T, kind):
    segments, branches, positions = layout_of_rows(rows, T)
    changes = dict(KINDS[kind])
    chunk = changes.pop("chunks", None)
    if "anchors" in changes:
        changes["anchors"] = anchors_of(rows, T)
    mask = branched(causal(len(rows), T, segments), positions, branches).replace(**changes)
    return mask if chunk is None else chunked(mask, positions, positions, chunk)


def attend_separately(rows, kind, q, k, v, mask, options, *, attend=reference.attend):
    """Attention of packed operands with every answer in a row of its own; zeros for padding. The
    gradient of a prompt is the sum over its answers.
    """
    sequences, changes = list(sequences_of(rows)), dict(KINDS[kind])
    longest = max(len(places) for _, places in sequences)
    row = np.array([row for row, _ in sequences])[:, None]
    places = np.stack([np.resize(places, longest) for _, places in sequences])
    chunk = changes.pop("chunks", None)
    if "anchors" in changes:
        changes["anchors"] = anchors_of(rows, q.shape[1])[row, places]
    alone = causal(len(sequences), longest).replace(**changes)
    if chunk is not None:
        alone = chunked(alone, alone.q_index, alone.k_index, chunk)
    outs = attend(*(x[row, places] for x in (q, k, v)), alone, options)
    out = jnp.zeros_like(q)
    for number, (row, places) in enumerate(sequences):
        out = out.at[row, places].set(outs[number, : len(places)])
    return out


@pytest.fixture(params=IMPLEMENTATIONS)
def named(request, monkeypatch) -> AttentionOptions:
    """Options that name an implementation."""
    name = f"{request.param}, runnable"
    monkeypatch.setitem(IMPLEMENTATIONS, name, runnable(request.param))
    return OPTIONS.replace(implementation=name)


def refuses(q, k, mask, options):
    """Whether the named implementation cannot serve, and says so."""
    if not (reason := IMPLEMENTATIONS[options.implementation].refuses(q, k, mask, options)):
        return False
    assert reason == "answers that share a prompt"
    with pytest.raises(UnsupportedAttention, match=reason):
        attend(q, k, k, mask, options)
    return True


# ---------------------------------------------------------------- implementations
def quick(kind, N, K):
    return (kind, N, K) in {
        ("full", 9, 3),
        ("window", 8, 2),
        ("groups", 6, 1),
        ("anchors", 8, 2),
        ("chunks", 9, 3),
    }


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "kind,N,K",
    [
        pytest.param(kind, N, K, marks=() if quick(kind, N, K) else pytest.mark.slow)
        for kind in KINDS
        for N, K in HEADS
    ],
)
def test_equals_a_row_for_each_answer(named, kind, N, K):
    (q, k, v), mask = make(T, N, K), packed_mask(ROWS, T, kind)
    if refuses(q, k, mask, named):
        return
    alone = functools.partial(attend_separately, ROWS, kind)
    options = named.replace(softcap=1.5, sinks=sinks_of(N)) if kind == "window" else named
    assert_equal(
        value_and_gradients(attend, q, k, v, mask, options),
        value_and_gradients(alone, q, k, v, mask, options),
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("N,K", HEADS)
@pytest.mark.parametrize(
    "groups",
    [
        Groups(30, 15),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (Groups(32, 16), Groups(32, 0))),
    ],
    ids=str,
)
def test_shifted_attention_equals_a_row_for_each_answer(N, K, groups):
    def shifted(q, k, v, mask, options):
        return attend_shifted(q, k, v, mask, groups, options)

    (q, k, v), mask = make(T, N, K), packed_mask(ROWS, T, "full")
    alone = functools.partial(attend_separately, ROWS, "full", attend=shifted)
    assert_equal(
        value_and_gradients(shifted, q, k, v, mask), value_and_gradients(alone, q, k, v, mask)
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["full", "window", "groups"])
def test_a_branch_changes_no_other_branch_and_not_the_trunk(named, kind):
    (q, k, v), mask = make(T, 4, 2), packed_mask(ROWS, T, kind)
    if refuses(q, k, mask, named):
        return
    changed = slice(40, 53)  # the first answer of the first row
    operands = [x.at[0, changed].add(1.0) for x in (q, k, v)]
    difference = attend(q, k, v, mask, named) != attend(*operands, mask, named)
    difference = np.asarray(difference.any((2, 3)))
    assert difference[0, changed].all()
    assert difference.sum() == difference[0, changed].sum()


def test_an_implementation_that_cannot_serve_branches_leaves_them_to_the_next():
    q = jnp.zeros((len(ROWS), T, 2, 16), jnp.bfloat16)
    options = OPTIONS.replace(platform="gpu")
    assert select(q, q, causal(len(ROWS), T), options) == "cudnn"
    assert select(q, q, packed_mask(ROWS, T, "full"), options) == "triton"


def test_rows_without_branches_compare_nothing_more():
    without = causal(len(ROWS), T, layout_of_rows(ROWS, T)[0])
    assert [list(rows) for rows in compared(without)] == [["index", "segment"]] * 2
    assert list(compared(packed_mask(ROWS, T, "full"))[0]) == ["index", "segment", "trunk"]


# ---------------------------------------------------------------- blocks
SIZE, ANSWERS, LENGTH = 32, 6, 64
TRUNK = 256
MANY = ((((TRUNK, (LENGTH,) * ANSWERS)), (LENGTH, (LENGTH, SIZE))),) * 3


@pytest.mark.sample(3)
@pytest.mark.parametrize("changes", [{}, {"window": 40}, {"group": 128, "shift": 64}], ids=str)
def test_blocks_of_other_branches_are_not_visited(changes):
    length = TRUNK + LENGTH * ANSWERS + 2 * LENGTH + SIZE
    segments, branches, positions = layout_of_rows(MANY, length)
    mask = branched(causal(3, length, segments), positions, branches).replace(**changes)
    blocks = length // SIZE
    pairs = np.asarray(visible(mask)).reshape(3, blocks, SIZE, blocks, SIZE)
    some = pairs.any((2, 4))
    np.testing.assert_array_equal(block_pairs(mask, SIZE, SIZE)[0], some)
    (over_keys, unmasked), (over_queries, _) = gpu_visits(mask)
    (_, by_queries), (_, by_keys) = tpu_visit_table(mask)
    np.testing.assert_array_equal(over_keys, some)
    np.testing.assert_array_equal(by_queries, some)
    # A block of a trunk is read by one span of queries; within it the pairs of blocks that see
    # nothing are skipped one by one.
    for visited in (over_queries.swapaxes(1, 2), by_keys.swapaxes(1, 2)):
        assert not (some & ~visited).any()
        answers = slice(TRUNK // SIZE, (TRUNK + ANSWERS * LENGTH) // SIZE)
        np.testing.assert_array_equal(visited[0][:, answers], some[0][:, answers])
        if not changes:
            np.testing.assert_array_equal(visited, some)
    if not changes:
        # most of what an answer visits is its trunk, which needs no mask
        last = TRUNK // SIZE + ANSWERS * LENGTH // SIZE - 1
        assert some[0, last].sum() == (TRUNK + LENGTH) // SIZE
        assert unmasked[0, last].sum() == TRUNK // SIZE


# ---------------------------------------------------------------- context parallelism
LONG = (  # of 256 tokens: 64 a device
    ((100, (40, 1, 30)), (1, (7, 20)), (25, ())),
    ((9, (50, 3, 20)), (90, (25, 31)), (20, (2,))),
)
PATTERNS = {  # kind of mask, groups
    "full": ("full", None),
    "window": ("window", None),
    "anchors": ("anchors", None),
    "shifted": ("full", Groups(32, 16)),
    "shifted, wide": ("full", Groups(96, 48)),
}
SLOW = ("anchors", "shifted, wide")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "mesh,N,K",
    [
        ({"fsdp": 2, "sequence": 4}, 8, 2),
        pytest.param({"sequence": 4, "tensor": 2}, 8, 4, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "sequence": 4}, 12, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "pattern",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PATTERNS],
)
def test_every_mode_equals_a_row_for_each_answer(mesh, N, K, pattern):
    (kind, groups), length = PATTERNS[pattern], 256
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(2, length, heads, 16)), jnp.float32) for heads in (N, K, K, N)
    )
    arrays = q, k, v, weights, packed_mask(LONG, length, kind)

    def whole(q, k, v, mask, options):
        if groups is None:
            return reference.attend(q, k, v, mask, options)
        return attend_shifted(q, k, v, mask, groups, options)

    def loss(q, k, v):
        out = attend_separately(LONG, kind, q, k, v, None, OPTIONS, attend=whole)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    wanted, mesh = (out, *gradients), make_mesh(**mesh)
    served = set()
    for mode in MODES:
        try:
            chosen, zigzag, _ = chosen_mode(
                mode, mesh, groups, T=length, N=N, K=K, window=arrays[-1].window
            )
        except ConfigError as refusal:
            assert mode in ("halo", "ulysses") and "use 'auto'" in str(refusal)
            continue
        here = reorder(arrays, 4) if zigzag else arrays
        got, _ = run(here, groups, Layout(mesh, chosen, zigzag), OPTIONS)
        assert_equal(got, reorder(wanted, 4) if zigzag else wanted)
        served.add(chosen)
    assert {"allgather", "ring"} <= served


def chosen_mode(mode, mesh, groups, *, T, N, K, window, branches=True):
    shape = mesh.shape
    return choose(
        mode,
        T=T,
        size=shape["sequence"],
        tensor=shape["tensor"],
        N=N,
        K=K,
        H=16,
        groups=groups,
        windows=(window,),
        branches=branches,
    )


def test_a_halo_is_too_short_for_branches_and_the_choice_says_so():
    mesh = make_mesh(sequence=4, tensor=2)
    auto = functools.partial(chosen_mode, "auto", mesh, None, T=4096, N=8, K=2, window=128)
    assert auto(branches=False)[0] == "halo"
    mode, _, reason = auto()
    assert mode != "halo"
    assert "no halo: an answer looks back to the end of its prompt" in reason
    with pytest.raises(ConfigError, match="='halo' .* looks back to the end of its prompt"):
        chosen_mode("halo", mesh, None, T=4096, N=8, K=2, window=128)
    mask, (q, k, v) = packed_mask(ROWS, T, "window"), make(T, 8, 2)
    with pytest.raises(ConfigError, match="='halo': an answer looks back"):
        attend_parallel(q, k, v, mask, OPTIONS, layout=Layout(mesh, "halo"))


def test_rows_with_branches_do_not_go_tile_by_tile():
    mask = causal(len(ROWS), T).replace(window=20)
    assert tile_reach(T, mask, None, 64, None) == 19
    assert tile_reach(T, packed_mask(ROWS, T, "window"), None, 64, None) is None
