"""Flash attention for TPU: three Pallas (Mosaic) kernels that visit only the blocks which the mask
leaves active.

The same mathematics as `lljax.attention.blockwise`: a running softmax (Dao et al. 2022, arXiv
2205.14135, algorithm 1), and a backward pass that recomputes the weights from the log-sum-exp (Dao
2023, arXiv 2307.08691, algorithm 2).

Nothing of the size T x S exists anywhere. From the smallest and largest index, segment, ... of each
block the device works out which span of key blocks each query block visits; that and the extremes
are all that scalar memory holds, O(T / bq + S / bk). The grid is as long as the longest of those
visits, which is known when the program runs: windows, groups and packed documents cost what they
hold. Key blocks are visited in the order of their indices, so that the active ones stand together
in whatever order the tokens came (zigzag).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lljax.attention.blockwise import FLOOR, MASKED, anchors_first
from lljax.attention.mask import NEVER, Mask, group_of
from lljax.attention.softcap import capped, through_cap

LANES = 128


def forward(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
    blocks=None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H]: the output, like q, and the log-sum-exp
    of each query's scores, float32 [B, T, N]. A query that sees nothing gets zeros, and FLOOR.

    interpret: run the kernels as plain XLA, on any platform; slow. blocks: (queries, keys) of a
      block, for tests.
    """
    call = _Call(q, k, v, mask, scale, softcap, interpret, blocks)
    out, lse = _forward(call)
    return call.rows(out), call.rows(jnp.swapaxes(lse, 3, 4))[..., 0]


def backward(
    q,
    k,
    v,
    mask: Mask,
    out,
    lse,
    d_out,
    *,
    scale: float,
    softcap: float | None = None,
    dtype=jnp.float32,
    interpret: bool = False,
    blocks=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` for q, k and v, given its results and the gradient of its output.

    `out` and `lse` may be those of attention over more keys than `k`: the sum over parts of the
    keys is the gradient.
    dtype: of the gradients; the sums are float32 in any case.
    """
    call = _Call(q, k, v, mask, scale, softcap, interpret, blocks)
    d_out, out = call.heads(d_out), call.heads(out)
    # float32: a small difference of large sums is taken with it. In the kernels' layout: in the
    # rows' layout the compiler makes float32 copies of both, each twice the size of the residual.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, :, None]
    operands = d_out, call.statistic(lse), delta
    dq = _backward_queries(call, *operands, dtype)
    dk, dv = _backward_keys(call, *operands, dtype)
    return call.rows(dq), call.keys(dk), call.keys(dv)


def block_sizes(B: int, T: int, S: int, H: int, dtype, mask: Mask) -> tuple[int, int]:
    """Queries and keys of a block.

    1024 x 1024 scores in float32 are 4 MB of vector memory (16 MB on v5e); wide heads and float32
    operands leave room for half of it. A short window or group takes smaller blocks, so that it is
    not rounded up to much more work than it holds; but no smaller than the matrix unit wants, nor
    so many that their `_Visits` overfill scalar memory (1 MB).
    """
    size = 1024 if H <= LANES and jnp.dtype(dtype).itemsize <= 2 else 512
    reach = min(size for size in (mask.group, mask.window, S) if size is not None)
    while size > 256 and size * 4 > reach and B * max(T, S) <= 8192 * size // 2:
        size //= 2
    return tuple(_up(-(-length // -(-length // size)), LANES) for length in (T, S))  # cut evenly


def _up(length: int, size: int) -> int:
    return -(-length // size) * size


def _pad(x, length: int, **kind):
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)), **kind)


class _Call:
    """The operands in the order that the kernels want, padded to whole blocks: q [B, K, R, T, H]
    (scaled), R = N / K; k, v [B, K, S, H]; q_rows, k_rows [B, names, length], what the mask
    compares; and the way back.
    """

    def __init__(
        self, q, k, v, mask: Mask, scale: float, softcap: float | None, interpret: bool, blocks
    ):
        self.B, self.T, self.N, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.R, self.scale, self.softcap = self.N // self.K, scale, softcap
        self.interpret, self.place = interpret, None
        if mask.anchors is not None and mask.window is not None:
            k, v, mask, self.place = anchors_first(k, v, mask)
        self.mask = mask
        self.bq, self.bk = blocks or block_sizes(self.B, self.T, self.S, self.H, q.dtype, mask)
        self.T_pad, self.S_pad = _up(self.T, self.bq), _up(self.S, self.bk)
        self.q = self.heads(q * scale)
        self.k, self.v = (jnp.swapaxes(_pad(x, self.S_pad), 1, 2) for x in (k, v))
        q_rows, k_rows = compared(mask)
        # A query of the padding is like the last one, which leaves the extremes of its block as
        # they are.
        q_rows = {name: _pad(x, self.T_pad, mode="edge") for name, x in q_rows.items()}
        k_rows = {name: _pad(x, self.S_pad, constant_values=NEVER) for name, x in k_rows.items()}
        self.q_names, self.k_names = tuple(q_rows), tuple(k_rows)
        self.operands = [
            (self.q, "q"),
            (self.k, "k"),
            (self.v, "k"),
            (jnp.stack(list(q_rows.values()), axis=1), "q_rows"),
            (jnp.stack(list(k_rows.values()), axis=1), "k_rows"),
        ]
        self.q_extremes, self.k_extremes = extremes(q_rows, self.bq), extremes(k_rows, self.bk)

    def heads(self, x):  # [B, T, N, H] -> [B, K, R, T, H]
        x = _pad(x, self.T_pad).reshape(self.B, self.T_pad, self.K, self.R, self.H)
        return jnp.transpose(x, (0, 2, 3, 1, 4))

    def statistic(self, x):  # [B, T, N] -> [B, K, R, 1, T]
        return jnp.moveaxis(_pad(x, self.T_pad), 1, 2).reshape(
            self.B, self.K, self.R, 1, self.T_pad
        )

    def rows(self, x):  # [B, K, R, T, ...] -> [B, T, N, ...]
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.B, self.T_pad, self.N, *x.shape[4:])[:, : self.T]

    def keys(self, x):  # [B, K, S, H] -> [B, S, K, H]
        x = jnp.swapaxes(x, 1, 2)[:, : self.S]
        return (
            x
            if self.place is None
            else jnp.take_along_axis(x, self.place[:, :, None, None], axis=1)
        )


# ---------------------------------------------------------------- the mask
def compared(mask: Mask) -> tuple[dict, dict]:
    """The mask as integers of the queries [B, T] and of the keys [B, S], by name, that `visible`
    compares.

    The window and the start of the group are one lower bound each, and an anchor is a key that is
    near every query.
    """
    q, k = {"index": mask.q_index}, {"index": mask.k_index}
    if mask.window is not None:
        q["near"] = mask.q_index - mask.window + 1
        if mask.anchors is not None:
            k["near"] = jnp.where(mask.anchors, NEVER, mask.k_index)
    if mask.group is not None:
        q["first"] = (
            group_of(mask, mask.q_index) * mask.group - (mask.group - mask.shift) % mask.group
        )
    if mask.q_segments is not None:
        q["segment"], k["segment"] = mask.q_segments, mask.k_segments
    return q, k


def visible(q: dict, k: dict) -> jax.Array:
    """Which queries see which keys, from values that broadcast against each other: `compared`, pair
    by pair.
    """
    see = k["index"] <= q["index"]
    if "near" in q:
        see &= k.get("near", k["index"]) >= q["near"]
    if "first" in q:
        see &= k["index"] >= q["first"]
    if "segment" in q:
        see &= k["segment"] == q["segment"]
    return see


def extremes(rows: dict, size: int) -> dict:
    """The lowest and highest of each block of each of `rows` [B, n * size], as [B, n]; of the real
    tokens only, for padding must not stretch the range of its block. `last` is the highest index,
    padding (NEVER) included.
    """
    rows = {name: x.reshape(x.shape[0], -1, size) for name, x in rows.items()}
    real = rows["index"] != NEVER
    found = {"last": rows["index"].max(-1)}
    for name, x in rows.items():
        found[name + "_low"] = jnp.where(real, x, NEVER).min(-1)
        found[name + "_high"] = jnp.where(real, x, -NEVER).max(-1)
    return found


def block_kinds(q: dict, k: dict):
    """Whether a pair of blocks may hold a visible pair, and whether it holds no other, from their
    `extremes`.
    """
    some, every = k["index_low"] <= q["index_high"], k["last"] <= q["index_low"]
    if "near_low" in q:
        low, high = (k.get("near" + end, k["index" + end]) for end in ("_low", "_high"))
        some, every = some & (high >= q["near_low"]), every & (low >= q["near_high"])
    if "first_low" in q:
        some, every = (
            some & (k["index_high"] >= q["first_low"]),
            every & (k["index_low"] >= q["first_high"]),
        )
    if "segment_low" in q:
        some &= (q["segment_low"] <= k["segment_high"]) & (k["segment_low"] <= q["segment_high"])
        every &= (q["segment_low"] == q["segment_high"]) & (k["segment_low"] == k["segment_high"])
        every &= q["segment_low"] == k["segment_low"]
    return some, every


class _Visits:
    """Which blocks `there` each block `here` visits: for queries here keys there, or the other way
    round.

    The blocks there are ranked by index, anchors before all others. A visit is a span of ranks
    among the anchors, then one among the others; `table` holds it for every block here, with the
    order and all extremes, as flat int32.
    """

    def __init__(self, here: dict, there: dict, kinds):
        anchors = (
            jnp.zeros_like(there["last"], bool)
            if "near_high" not in there
            else there["near_high"] == NEVER
        )
        order = jnp.argsort(there["index_low"] - jnp.where(anchors, NEVER, 0), axis=1)
        there = {name: jnp.take_along_axis(x, order, axis=1) for name, x in there.items()}
        some, _ = kinds(
            {name: x[:, :, None] for name, x in here.items()},
            {name: x[:, None, :] for name, x in there.items()},
        )
        if "near_high" in there:
            anchored = jnp.arange(some.shape[2]) < anchors.sum(1)[:, None, None]
            (far_from, far), (near_from, near) = _span(some & anchored), _span(some & ~anchored)
        else:
            far_from, far = (jnp.zeros(some.shape[:2], jnp.int32),) * 2
            near_from, near = _span(some)
        columns = {
            "order": order,
            "far_from": far_from,
            "far": far,
            "near_from": near_from,
            "count": far + near,
        }
        columns |= {"here " + name: x for name, x in here.items()} | {
            "there " + name: x for name, x in there.items()
        }
        self.here, self.there, self.kinds, self.starts, start = (
            tuple(here),
            tuple(there),
            kinds,
            {},
            0,
        )
        for name, x in columns.items():
            self.starts[name] = start, x.shape[1]
            start += x.size
        self.table = jnp.concatenate([x.reshape(-1) for x in columns.values()])
        # 1: a block that visits none still writes its zeros
        self.longest = jnp.maximum(jnp.max(far + near), 1)

    def read(self, table, name: str, b, n):
        start, length = self.starts[name]
        return table[start + b * length + n]

    def rank(self, table, b, n, step):
        """The block (by rank) that block `n` visits at `step`. After the last it stays, and nothing
        more is fetched.
        """
        step = jnp.clip(step, 0, jnp.maximum(self.read(table, "count", b, n) - 1, 0))
        far = self.read(table, "far", b, n)
        return jnp.where(
            step < far,
            self.read(table, "far_from", b, n) + step,
            self.read(table, "near_from", b, n) + step - far,
        )

    def place(self, table, b, n, step):
        """Where that block stands."""
        return self.read(table, "order", b, self.rank(table, b, n, step))

    def visit(self, table, b, n, step, update):
        """In a kernel, runs update(masked) if the pair of blocks may hold a visible pair; masked,
        if others too.
        """
        rank = self.rank(table, b, n, step)
        some, every = self.kinds(
            {name: self.read(table, "here " + name, b, n) for name in self.here},
            {name: self.read(table, "there " + name, b, rank) for name in self.there},
        )
        some &= step < self.read(table, "count", b, n)
        pl.when(some & every)(lambda: update(False))
        pl.when(some & ~every)(lambda: update(True))


def _span(active) -> tuple[jax.Array, jax.Array]:
    """First place and length of the shortest span that holds every active place of the last
    axis.
    """
    place = jnp.arange(active.shape[-1], dtype=jnp.int32)
    low = jnp.min(jnp.where(active, place, active.shape[-1] - 1), axis=-1)
    high = jnp.max(jnp.where(active, place, -1), axis=-1)
    return low, jnp.maximum(high - low + 1, 0)


# ---------------------------------------------------------------- the kernels
def _forward(call: _Call) -> tuple[jax.Array, jax.Array]:
    """The output, like call.q, and the log-sum-exp [B, K, R, 1, T]."""
    visits = _Visits(call.q_extremes, call.k_extremes, block_kinds)

    def kernel(table, q, k, v, q_rows, k_rows, out, lse, top, total, acc):
        b, i, step, last = (
            pl.program_id(0),
            pl.program_id(3),
            pl.program_id(4),
            pl.num_programs(4) - 1,
        )

        @pl.when(step == 0)
        def start():
            top[...] = jnp.full_like(top, FLOOR)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def update(masked):
            scores = _scores(call, q, k, q_rows, k_rows, masked)
            new_top = jnp.maximum(top[...], scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - new_top)
            shrink = jnp.exp(top[...] - new_top)
            top[...] = new_top
            total[...] = total[...] * shrink + weights.sum(-1, keepdims=True)
            acc[...] = acc[...] * shrink + _dot(weights.astype(v.dtype), v, 1, 0)

        visits.visit(table, b, i, step, update)

        @pl.when(step == last)
        def finish():
            some = jnp.where(total[...] == 0.0, 1.0, total[...])
            out[...] = (acc[...] / some).astype(out.dtype)
            lse[...] = (top[...] + jnp.log(some)).T

    # float32: the running sums of a long row
    return _launch(
        "attention_forward",
        kernel,
        call,
        visits,
        products=2,
        operands=call.operands,
        outputs=[
            (call.q.shape, call.q.dtype, "q"),
            ((*call.q.shape[:3], 1, call.T_pad), jnp.float32, "statistic"),
        ],
        scratch=[(call.bq, 1), (call.bq, 1), (call.bq, call.H)],
    )


def _backward_queries(call: _Call, d_out, lse, delta, dtype) -> jax.Array:
    """The gradient of the unscaled queries, like call.q."""
    visits = _Visits(call.q_extremes, call.k_extremes, block_kinds)

    def kernel(table, q, k, v, q_rows, k_rows, d_out, lse, delta, dq, acc):
        b, i, step, last = (
            pl.program_id(0),
            pl.program_id(3),
            pl.program_id(4),
            pl.num_programs(4) - 1,
        )

        @pl.when(step == 0)
        def start():
            acc[...] = jnp.zeros_like(acc)

        def update(masked):
            scores = _scores(call, q, k, q_rows, k_rows, masked)
            weights = jnp.exp(scores - _column(lse[0]))
            d_scores = through_cap(
                weights * (_dot(d_out, v, 1, 1) - _column(delta[0])), scores, call.softcap
            )
            acc[...] += _dot(d_scores.astype(k.dtype), k, 1, 0)

        visits.visit(table, b, i, step, update)

        @pl.when(step == last)
        def finish():
            dq[...] = (acc[...] * call.scale).astype(dq.dtype)

    return _launch(
        "attention_backward_queries",
        kernel,
        call,
        visits,
        products=3,
        operands=[*call.operands, (d_out, "q"), (lse, "statistic"), (delta, "statistic")],
        outputs=[(call.q.shape, dtype, "q")],
        scratch=[(call.bq, call.H)],
    )[0]


def _backward_keys(call: _Call, d_out, lse, delta, dtype) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, like call.k. Scores are [keys, queries] here: so no product
    but of operands as they lie, and the statistics of the queries are rows.
    """
    visits = _Visits(call.k_extremes, call.q_extremes, lambda k, q: block_kinds(q, k))

    def kernel(table, q, k, v, q_rows, k_rows, d_out, lse, delta, dk, dv, dk_acc, dv_acc):
        b, j, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
        heads, steps = pl.num_programs(3), pl.num_programs(4)

        @pl.when((head == 0) & (step == 0))
        def start():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        def update(masked):
            scores = capped(_dot(k, q, 1, 1), call.softcap)
            if masked:
                see = visible(_rows(q_rows, call.q_names), _columns(k_rows, call.k_names))
                scores = jnp.where(see, scores, MASKED)
            weights = jnp.exp(scores - lse[...])
            dv_acc[...] += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
            d_scores = through_cap(
                weights * (_dot(v, d_out, 1, 1) - delta[...]), scores, call.softcap
            )
            dk_acc[...] += _dot(d_scores.astype(q.dtype), q, 1, 0)

        visits.visit(table, b, j, step, update)

        @pl.when((head == heads - 1) & (step == steps - 1))
        def finish():
            dk[...] = dk_acc[...].astype(dk.dtype)
            dv[...] = dv_acc[...].astype(dv.dtype)

    return _launch(
        "attention_backward_keys",
        kernel,
        call,
        visits,
        products=4,
        by_keys=True,
        operands=[*call.operands, (d_out, "q"), (lse, "statistic"), (delta, "statistic")],
        outputs=[(call.k.shape, dtype, "k")] * 2,
        scratch=[(call.bk, call.H)] * 2,
    )


def _scores(call: _Call, q, k, q_rows, k_rows, masked: bool) -> jax.Array:
    """Of a pair of blocks, [queries, keys]."""
    scores = capped(_dot(q, k, 1, 1), call.softcap)
    if not masked:
        return scores
    return jnp.where(
        visible(_columns(q_rows, call.q_names), _rows(k_rows, call.k_names)), scores, MASKED
    )


def _dot(a, b, axis_a: int, axis_b: int) -> jax.Array:
    """The product of two blocks over one axis of each, summed in float32 as the matrix unit
    does.
    """
    return jax.lax.dot_general(
        a[...], b[...], (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _rows(block, names) -> dict:  # of [names, tokens], each [1, tokens]
    return {name: block[n : n + 1, :] for n, name in enumerate(names)}


def _columns(block, names) -> dict:  # of [names, tokens], each [tokens, 1]
    return {name: _column(block[n]) for n, name in enumerate(names)}


def _column(row):
    return jnp.expand_dims(row, -1)


def _launch(
    name: str,
    kernel,
    call: _Call,
    visits: _Visits,
    *,
    products: int,
    operands,
    outputs,
    scratch,
    by_keys: bool = False,
):
    """Runs a kernel over (batch, key/value head, query head of it, block of queries, step of its
    visit); or `by_keys`, (batch, key/value head, block of keys, query head, step), which sums over
    the query heads.

    operands: (array, kind of block). outputs: (shape, dtype, kind of block). products: matrix
      products of a pair.
    """
    if by_keys:
        grid, parallel = (call.B, call.K, call.S_pad // call.bk, call.R), 3

        def places(b, h, j, r, step, table):
            return b, h, r, visits.place(table, b, j, step), j
    else:
        grid, parallel = (call.B, call.K, call.R, call.T_pad // call.bq), 4

        def places(b, h, r, i, step, table):
            return b, h, r, i, visits.place(table, b, i, step)

    def spec(shape, pick):
        return pl.BlockSpec(shape, lambda *ids: pick(*places(*ids)))

    specs = {
        "q": spec((None, None, None, call.bq, call.H), lambda b, h, r, i, j: (b, h, r, i, 0)),
        "k": spec((None, None, call.bk, call.H), lambda b, h, r, i, j: (b, h, j, 0)),
        "q_rows": spec((None, len(call.q_names), call.bq), lambda b, h, r, i, j: (b, 0, i)),
        "k_rows": spec((None, len(call.k_names), call.bk), lambda b, h, r, i, j: (b, 0, j)),
        "statistic": spec((None, None, None, 1, call.bq), lambda b, h, r, i, j: (b, h, r, 0, i)),
    }
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*grid, visits.longest),
            in_specs=[specs[kind] for _, kind in operands],
            out_specs=[specs[kind] for *_, kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (5 - parallel)
        ),
        cost_estimate=_cost(call, products, operands),
        interpret=call.interpret,
        name=name,
    )(visits.table, *(x for x, _ in operands))


def _cost(call: _Call, products: int, operands) -> pl.CostEstimate:
    """What the kernel costs if the queries stand in order: within a limited reach at the end of the
    keys, else spread evenly over them, as on one of many devices.
    """
    reach = min(size for size in (call.mask.group, call.mask.window, call.S) if size is not None)
    pairs = 0
    for end in range(call.bq, call.T_pad + 1, call.bq):
        if reach == call.S:
            first, last = 0, end * call.S // call.T
        else:
            last = call.S - call.T + end
            start = last - call.bq
            first = start // reach * reach if reach == call.mask.group else start - reach + 1
        pairs += -(-min(last, call.S) // call.bk) - max(first, 0) // call.bk
    scores = call.B * call.N * pairs * call.bq * call.bk
    streamed = 2 * scores // call.bq * call.H * call.k.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * scores * call.H,
        transcendentals=scores,
        bytes_accessed=streamed + sum(x.size * x.dtype.itemsize for x, _ in operands),
    )
