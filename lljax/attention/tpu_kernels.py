"""The TPU kernels of `lljax.attention.tpu`: forward, the gradient of queries, and the gradients of
keys and values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lljax.attention import tpu_visits
from lljax.attention.blocks import (
    anchors_first,
    compared,
    extremes,
    in_row_order,
    pad_tokens,
    reach,
    token_visible,
)
from lljax.attention.blockwise import FLOOR, MASKED
from lljax.attention.mask import NEVER, Mask
from lljax.attention.softcap import apply_softcap, softcap_gradient
from lljax.parallel.rounding import cdiv, round_up

LANES = 128


def block_sizes(
    B: int, T: int, S: int, H: int, dtype: jax.typing.DTypeLike, mask: Mask
) -> tuple[int, int]:
    """Queries and keys of a block.

    1024 x 1024 scores in float32 are 4 MB of vector memory (16 MB on v5e); wide heads and float32
    operands leave room for half of it. A short window or group takes smaller blocks, so that it is
    not rounded up to much more work than it holds; but no smaller than the matrix unit wants, nor
    so many that their `Visits` overfill scalar memory (1 MB).
    """
    size = 1024 if H <= LANES and jnp.dtype(dtype).itemsize <= 2 else 512
    while size > 256 and size * 4 > reach(mask, S) and B * max(T, S) <= 8192 * size // 2:
        size //= 2
    bq, bk = (round_up(cdiv(length, cdiv(length, size)), LANES) for length in (T, S))  # cut evenly
    return bq, bk


class Call:
    """The operands in the order that the kernels want, padded to whole blocks: q [B, K, R, T, H]
    (scaled), R = N / K; k, v [B, K, S, H]; q_rows, k_rows [B, names, length], the
    integers that the mask compares; and the way back.
    """

    def __init__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        *,
        scale: float,
        softcap: float | None,
        interpret: bool,
        blocks: tuple[int, int] | None,
    ):
        self.B, self.T, self.N, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.R, self.scale, self.softcap = self.N // self.K, scale, softcap
        self.interpret, self.places = interpret, None
        if mask.anchors is not None and mask.window is not None:
            k, v, mask, self.places = anchors_first(k, v, mask)
        self.mask = mask
        self.bq, self.bk = blocks or block_sizes(self.B, self.T, self.S, self.H, q.dtype, mask)
        self.T_pad, self.S_pad = round_up(self.T, self.bq), round_up(self.S, self.bk)
        self.q = self.heads(q * scale)
        self.k, self.v = (jnp.swapaxes(pad_tokens(x, self.S_pad), 1, 2) for x in (k, v))
        q_rows, k_rows = compared(mask)
        # A query of the padding is like the last one, which leaves the extremes of its block as
        # they are.
        q_rows = {name: pad_tokens(x, self.T_pad, mode="edge") for name, x in q_rows.items()}
        k_rows = {
            name: pad_tokens(x, self.S_pad, constant_values=NEVER) for name, x in k_rows.items()
        }
        self.q_names, self.k_names = tuple(q_rows), tuple(k_rows)
        self.operands = [
            (self.q, "q"),
            (self.k, "k"),
            (self.v, "k"),
            (jnp.stack(list(q_rows.values()), axis=1), "q_rows"),
            (jnp.stack(list(k_rows.values()), axis=1), "k_rows"),
        ]
        self.q_extremes, self.k_extremes = extremes(q_rows, self.bq), extremes(k_rows, self.bk)

    def heads(self, x: jax.Array) -> jax.Array:  # [B, T, N, H] -> [B, K, R, T, H]
        x = pad_tokens(x, self.T_pad).reshape(self.B, self.T_pad, self.K, self.R, self.H)
        return jnp.transpose(x, (0, 2, 3, 1, 4))

    def statistic(self, x: jax.Array) -> jax.Array:  # [B, T, N] -> [B, K, R, 1, T]
        return jnp.moveaxis(pad_tokens(x, self.T_pad), 1, 2).reshape(
            self.B, self.K, self.R, 1, self.T_pad
        )

    def rows(self, x: jax.Array) -> jax.Array:  # [B, K, R, T, ...] -> [B, T, N, ...]
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.B, self.T_pad, self.N, *x.shape[4:])[:, : self.T]

    def keys(self, x: jax.Array) -> jax.Array:  # [B, K, S, H] -> [B, S, K, H]
        return in_row_order(jnp.swapaxes(x, 1, 2)[:, : self.S], self.places)


# ---------------------------------------------------------------- the kernels
def forward(call: Call) -> tuple[jax.Array, jax.Array]:
    """The output, like call.q, and the log-sum-exp [B, K, R, 1, T]."""
    visits = tpu_visits.of_queries(call.q_extremes, call.k_extremes)

    def kernel(table, *refs):
        q, k, v, q_rows, k_rows, out, lse, top, total, acc = refs
        b, i, step = (pl.program_id(axis) for axis in (0, 3, 4))
        last = pl.num_programs(4) - 1

        @pl.when(step == 0)
        def start():
            top[...] = jnp.full_like(top, FLOOR)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def update(masked: bool):
            scores = _scores(call, q, k, q_rows, k_rows, masked=masked)
            new_top = jnp.maximum(top[...], scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - new_top)
            shrink = jnp.exp(top[...] - new_top)
            top[...] = new_top
            total[...] = total[...] * shrink + weights.sum(-1, keepdims=True)
            acc[...] = acc[...] * shrink + _dot(weights.astype(v.dtype), v, 1, 0)

        visits.visit(table, b, i, step, update)

        @pl.when(step == last)
        def finish():
            divisor = jnp.where(total[...] == 0.0, 1.0, total[...])
            out[...] = (acc[...] / divisor).astype(out.dtype)
            lse[...] = (top[...] + jnp.log(divisor)).T

    # float32: the running sums of a long row
    out, lse = _launch(
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
    return out, lse


def backward_queries(
    call: Call, d_out: jax.Array, lse: jax.Array, delta: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The gradient of the unscaled queries, like call.q."""
    visits = tpu_visits.of_queries(call.q_extremes, call.k_extremes)

    def kernel(table, *refs):
        q, k, v, q_rows, k_rows, d_out, lse, delta, dq, acc = refs
        b, i, step = (pl.program_id(axis) for axis in (0, 3, 4))
        last = pl.num_programs(4) - 1

        @pl.when(step == 0)
        def start():
            acc[...] = jnp.zeros_like(acc)

        def update(masked: bool):
            scores = _scores(call, q, k, q_rows, k_rows, masked=masked)
            weights = jnp.exp(scores - _column(lse[0]))
            d_scores = weights * (_dot(d_out, v, 1, 1) - _column(delta[0]))
            d_scores = softcap_gradient(d_scores, scores, call.softcap)
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


def backward_keys(
    call: Call, d_out: jax.Array, lse: jax.Array, delta: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, like call.k. Scores are [keys, queries] here: every product
    takes its operands as they are stored, and the statistics of the queries are rows.
    """
    visits = tpu_visits.of_keys(call.q_extremes, call.k_extremes)

    def kernel(table, *refs):
        q, k, v, q_rows, k_rows, d_out, lse, delta, dk, dv, dk_acc, dv_acc = refs
        b, j, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
        heads, steps = pl.num_programs(3), pl.num_programs(4)

        @pl.when((head == 0) & (step == 0))
        def start():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        def update(masked: bool):
            scores = apply_softcap(_dot(k, q, 1, 1), call.softcap)
            if masked:
                see = token_visible(_rows(q_rows, call.q_names), _columns(k_rows, call.k_names))
                scores = jnp.where(see, scores, MASKED)
            weights = jnp.exp(scores - lse[...])
            dv_acc[...] += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
            d_scores = weights * (_dot(v, d_out, 1, 1) - delta[...])
            d_scores = softcap_gradient(d_scores, scores, call.softcap)
            dk_acc[...] += _dot(d_scores.astype(q.dtype), q, 1, 0)

        visits.visit(table, b, j, step, update)

        @pl.when((head == heads - 1) & (step == steps - 1))
        def finish():
            dk[...] = dk_acc[...].astype(dk.dtype)
            dv[...] = dv_acc[...].astype(dv.dtype)

    dk, dv = _launch(
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
    return dk, dv


def _scores(call: Call, q, k, q_rows, k_rows, *, masked: bool) -> jax.Array:
    """Scores [queries, keys] of a pair of blocks."""
    scores = apply_softcap(_dot(q, k, 1, 1), call.softcap)
    if not masked:
        return scores
    see = token_visible(_columns(q_rows, call.q_names), _rows(k_rows, call.k_names))
    return jnp.where(see, scores, MASKED)


def _dot(a, b, axis_a: int, axis_b: int) -> jax.Array:
    """The product of two blocks over one axis of each, summed in float32 as the matrix unit
    does.
    """
    return jax.lax.dot_general(
        a[...], b[...], (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _rows(block, names: tuple[str, ...]) -> dict:  # of [names, tokens], each [1, tokens]
    return {name: block[n : n + 1, :] for n, name in enumerate(names)}


def _columns(block, names: tuple[str, ...]) -> dict:  # of [names, tokens], each [tokens, 1]
    return {name: _column(block[n]) for n, name in enumerate(names)}


def _column(row):
    return jnp.expand_dims(row, -1)


def _launch(
    name: str,
    kernel: Callable[..., None],
    call: Call,
    visits: tpu_visits.Visits,
    *,
    products: int,
    operands: list[tuple[jax.Array, str]],
    outputs: list[tuple[tuple[int, ...], jax.typing.DTypeLike, str]],
    scratch: list[tuple[int, ...]],
    by_keys: bool = False,
) -> list[jax.Array]:
    """Runs a kernel over (batch, key/value head, query head of it, block of queries, step of its
    visit); or `by_keys`, (batch, key/value head, block of keys, query head, step), which sums over
    the query heads.

    products: matrix products of a pair of blocks. operands: (array, kind of block). outputs:
      (shape, dtype, kind of block). scratch: shapes, float32.
    """
    if by_keys:
        grid, parallel = (call.B, call.K, call.S_pad // call.bk, call.R), 3
    else:
        grid, parallel = (call.B, call.K, call.R, call.T_pad // call.bq), 4

    def places(*ids):
        """(batch, key/value head, query head, block of queries, block of keys) of a program."""
        if by_keys:
            b, h, j, r, step, table = ids
            return b, h, r, visits.index(table, b, j, step), j
        b, h, r, i, step, table = ids
        return b, h, r, i, visits.index(table, b, i, step)

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


def _cost(call: Call, products: int, operands: list[tuple[jax.Array, str]]) -> pl.CostEstimate:
    """The cost of a kernel if the queries stand in order: within a limited reach at the end of the
    keys, else spread evenly over them, as on one of many devices.
    """
    limit = reach(call.mask, call.S)
    pairs = 0
    for end in range(call.bq, call.T_pad + 1, call.bq):
        if limit == call.S:
            first, last = 0, end * call.S // call.T
        else:
            last = call.S - call.T + end
            start = last - call.bq
            first = start // limit * limit if limit == call.mask.group else start - limit + 1
        pairs += cdiv(min(last, call.S), call.bk) - max(first, 0) // call.bk
    scores = call.B * call.N * pairs * call.bq * call.bk
    streamed = 2 * scores // call.bq * call.H * call.k.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * scores * call.H,
        transcendentals=scores,
        bytes_accessed=streamed + sum(x.size * x.dtype.itemsize for x, _ in operands),
    )
