"""Flash attention for NVIDIA GPUs: Pallas kernels through Triton, for every mask.

They follow Dao 2023, arXiv 2307.08691, algorithms 1 and 2, as `lljax.attention.blockwise` does. A
block of queries loops over blocks of keys only where the mask leaves something. Nothing dense is
kept: XLA reduces the mask to the smallest and largest index, segment and group of each block, and
to six numbers that bound the loops of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lljax.attention.blockwise import FLOOR, MASKED, anchors_first
from lljax.attention.mask import NEVER, Mask, group_of, pad
from lljax.attention.softcap import capped, through_cap

LOG2_E = math.log2(math.e)  # the GPU has an instruction for powers of two only
PAIRS_AT_ONCE = 2**22  # pairs of blocks that are told apart at once: a few bytes each


def forward(
    q, k, v, mask: Mask, *, scale: float, softcap: float | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H]: the output, like q, and the log-sum-exp
    of each query's scores, float32 [B, T, N]. A query that sees nothing gets zeros, and FLOOR.
    """
    call = _Call(q, k, v, mask, *forward_blocks(q.shape[3], q.dtype), interpret)
    q = call.queries(q)
    lse = jax.ShapeDtypeStruct((call.B, call.N, q.shape[1]), jnp.float32)
    kernel = functools.partial(_forward_kernel, scale=scale, softcap=_base_2(softcap))
    out, lse = call.over_queries(kernel, {"BTNH": (q,)}, [("BTNH", q), ("BNT", lse)])
    return call.queries_back(out), jnp.moveaxis(lse, 1, 2)[:, : call.T]


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
    interpret: bool = False,
    dtype=jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` for q, k and v, given its results and the gradient of its output.

    `out` and `lse` may be those of attention over more keys than `k`: the sum over parts of the
    keys is the gradient.
    dtype: what each gradient is rounded to, once, after float32 sums; float32 where parts are still
      to be summed.
    """
    call = _Call(q, k, v, mask, *backward_blocks(q.shape[3], q.dtype), interpret)
    # float32: delta is subtracted from products of the same size
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q, d_out = call.queries(q), call.queries(d_out.astype(q.dtype))
    given = {"BTNH": (q, d_out), "BNT": (call.statistics(lse), call.statistics(delta))}
    like = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
    how = {"scale": scale, "softcap": _base_2(softcap)}
    (dq,) = call.over_queries(functools.partial(_dq_kernel, **how), given, [("BTNH", like(q))])
    dk, dv = call.over_keys(
        functools.partial(_dkv_kernel, **how), given, [("BSKH", like(call.k))] * 2
    )
    return call.queries_back(dq), call.keys_back(dk), call.keys_back(dv)


def _base_2(softcap: float | None) -> float | None:
    """Of scores that are powers of two."""
    return None if softcap is None else softcap * LOG2_E


def forward_blocks(H: int, dtype) -> tuple[int, int]:
    """Queries and keys of a block, such that two stages of keys and values fit the 99 KB of an A10
    or L4.
    """
    return (128, 64) if H <= 128 and jnp.dtype(dtype).itemsize == 2 else (64, 32)


def backward_blocks(H: int, dtype) -> tuple[int, int]:
    """The same for the backward pass, which holds twice as many operands."""
    return (64, 64) if H <= 128 and jnp.dtype(dtype).itemsize == 2 else (32, 32)


class _Call:
    """Operands padded to whole blocks, the mask reduced to what the kernels read, and the two ways
    to launch a kernel.

    Arrays are named by the letters of their axes: those of the package; I and J, blocks of queries
      and of keys; C, what the mask compares (see `_compared`); and 2 and 6, of `_ranges` and
      `_spans`.
    """

    def __init__(self, q, k, v, mask: Mask, bq: int, bk: int, interpret: bool):
        self.B, self.T, self.N, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.bq, self.bk, self.interpret = bq, bk, interpret
        self.T_pad, self.S_pad = -(-self.T // bq) * bq, -(-self.S // bk) * bk
        self.H_pad = max(16, pl.next_power_of_2(self.H))
        anchored, self.places = mask.window is not None and mask.anchors is not None, None
        if anchored:
            k, v, mask, self.places = anchors_first(k, v, mask)
        self.k, self.v = (_pad(x, {1: self.S_pad, 3: self.H_pad}) for x in (k, v))
        self.window, mask = (
            mask.window,
            pad(mask if anchored else mask.replace(anchors=None), self.T_pad, self.S_pad),
        )
        real = mask.k_index != NEVER
        self.q_rows, self.k_rows = _compared(mask, real)
        self.q_range, self.k_range = (
            _ranges(self.q_rows, bq),
            _ranges(self.k_rows, bk, real[:, None]),
        )
        self.whole = real.reshape(self.B, -1, bk).all(-1)
        # Blocks that hold an anchor: after `anchors_first` the first ones.
        self.front = -(-mask.anchors.sum(1) // bk) if anchored else None

    def queries(self, x):  # [B, T, N, H] as the kernels read it, and back
        return _pad(x, {1: self.T_pad, 3: self.H_pad})

    def queries_back(self, x):
        return x[:, : self.T, :, : self.H]

    def statistics(self, x):  # [B, T, N] -> [B, N, T]
        return _pad(jnp.moveaxis(x, 1, 2), {2: self.T_pad})

    def keys_back(self, x):  # [B, S, K, H] as the caller ordered it
        x = x[:, : self.S, :, : self.H]
        if self.places is None:
            return x
        return jnp.take_along_axis(x, self.places[:, :, None, None], axis=1)

    def over_queries(self, kernel, given, results):
        """Runs `kernel` for each block of queries of each head."""
        blocks, R = self.T_pad // self.bq, self.N // self.K
        # the last first: causality makes their loops the longest
        late = lambda n, i, b: blocks - 1 - i
        cut = {
            "B": (None, lambda n, i, b: b),
            "N": (None, lambda n, i, b: n),
            "T": (self.bq, late),
            "I": (None, late),
            "K": (None, lambda n, i, b: jax.lax.div(n, R)),
        }
        return self._launch(
            functools.partial(kernel, bk=self.bk),
            (self.N, blocks, self.B),
            cut,
            given,
            ("B6I", self.spans_of_queries()),
            results,
        )

    def over_keys(self, kernel, given, results):
        """Runs `kernel` for each block of keys of each key/value head."""
        blocks, R = self.S_pad // self.bk, self.N // self.K
        cut = {
            "B": (None, lambda n, j, b: b),
            "N": (R, lambda n, j, b: n),
            "K": (None, lambda n, j, b: n),
            "S": (self.bk, lambda n, j, b: j),
            "J": (None, lambda n, j, b: j),
        }
        return self._launch(
            functools.partial(kernel, bq=self.bq),
            (self.K, blocks, self.B),
            cut,
            given,
            ("B6J", self.spans_of_keys()),
            results,
        )

    def spans_of_queries(self):
        return _spans(
            lambda q: self._kinds(q, self.k_range, self.whole),
            (self.q_range,),
            self.whole.shape,
            self.front,
        )

    def spans_of_keys(self):
        return _spans(
            lambda k, whole: self._kinds(self.q_range, k, whole),
            (self.k_range, self.whole),
            (self.B, self.q_range.shape[-1]),
        )

    def _kinds(self, q_range, k_range, whole):
        """`_some` and `_full` of pairs of blocks, bool [B, blocks], for ranges [B, 2, C, blocks]
        that broadcast.
        """
        q, k = (
            [[x[:, i, c] for c in range(x.shape[2])] for i in (0, 1)] for x in (q_range, k_range)
        )
        return _some(self.window, q, k), _full(self.window, q, k) & whole

    def _launch(self, kernel, grid, cut, given, spans, results):
        """cut: of some letters, the size of the piece that a program gets (None: an element), and
        which.
        """

        def spec(letters, x):
            sizes, places = zip(
                *(
                    cut.get(letter, (length, lambda *_: 0))
                    for letter, length in zip(letters, x.shape)
                )
            )
            return pl.BlockSpec(sizes, lambda *program: tuple(place(*program) for place in places))

        operands = [(letters, x) for letters, xs in given.items() for x in xs]
        operands += [
            ("BSKH", self.k),
            ("BSKH", self.v),
            ("BCT", self.q_rows),
            ("BCS", self.k_rows),
            ("B2CI", self.q_range),
            ("B2CJ", self.k_range),
            spans,
        ]
        return pl.pallas_call(
            functools.partial(kernel, window=self.window),
            grid=grid,
            interpret=self.interpret,
            in_specs=[spec(*named) for named in operands],
            out_specs=[spec(*named) for named in results],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in results],
            compiler_params=plgpu.CompilerParams(
                num_warps=8 if self.H_pad >= 128 else 4, num_stages=2
            ),
        )(*(x for _, x in operands))


def _pad(x, lengths: dict):
    return jnp.pad(
        x, [(0, lengths.get(axis, length) - length) for axis, length in enumerate(x.shape)]
    )


# ---------------------------------------------------------------- the mask, of blocks and of tokens
def _compared(mask: Mask, real) -> tuple[jax.Array, jax.Array]:
    """What the mask compares, int32 [B, C, T] of queries and [B, C, S] of keys: the index, the
    segment and the group where there are any, and, of keys only, whether it is an anchor.
    """
    q, k = [mask.q_index], [mask.k_index]
    if mask.q_segments is not None:
        q, k = [*q, mask.q_segments], [*k, mask.k_segments]
    if mask.group is not None:
        q, k = (
            [*q, group_of(mask, mask.q_index)],
            [*k, group_of(mask, jnp.where(real, mask.k_index, 0))],
        )
    if mask.anchors is not None:
        k = [*k, mask.anchors]
    return tuple(jnp.stack([x.astype(jnp.int32) for x in rows], axis=1) for rows in (q, k))


def _ranges(rows, size: int, real=True):
    """Smallest and largest of each block, int32 [B, 2, C, blocks]; of real tokens: padding must not
    stretch a range.
    """
    blocks = lambda x: x.reshape(*x.shape[:2], -1, size)
    rows, real = blocks(rows), real if real is True else blocks(real)
    return jnp.stack(
        [jnp.where(real, rows, NEVER).min(-1), jnp.where(real, rows, -NEVER).max(-1)], axis=1
    )


def _some(window: int | None, q, k):
    """Whether a pair of blocks may hold a visible pair, from the ranges (smallest, largest) of all
    that is compared.

    For blocks of one token the answer is exact: it is the mask.
    """
    (q_low, q_high), (k_low, k_high) = q, k
    some = k_low[0] <= q_high[0]  # false for NEVER
    if window is not None:
        near = q_low[0] - k_high[0] < window
        some &= near | (k_high[-1] > 0) if len(k_low) > len(q_low) else near
    for c in range(1, len(q_low)):
        some &= (q_low[c] <= k_high[c]) & (k_low[c] <= q_high[c])
    return some


def _full(window: int | None, q, k):
    """Whether a pair of blocks holds visible pairs only, if all of its tokens are real."""
    (q_low, q_high), (k_low, k_high) = q, k
    full = k_high[0] <= q_low[0]
    if window is not None:
        near = q_high[0] - k_low[0] < window
        full &= near | (k_low[-1] > 0) if len(k_low) > len(q_low) else near
    for c in range(1, len(q_low)):
        full &= (q_low[c] == q_high[c]) & (k_low[c] == k_high[c]) & (q_low[c] == k_low[c])
    return full


def _spans(kinds, own, others: tuple[int, int], front=None):
    """Bounds of the loops of each block over blocks of the other kind, whose row is [B, blocks]:
    `others` is its shape.

    kinds(*block of own) -> (some, full), bool [B, others]. Called for few blocks at a time: no
    table of all pairs is kept.

    Returns: int32 [B, 6, blocks]: a0, a1, start, f0, f1, stop. What is active lies in [a0, a1), in
      front of `front` [B], and in [start, stop); of the latter [f0, f1) is full, and empty unless
      all that is full lies side by side.
    """
    place = jnp.arange(others[1], dtype=jnp.int32)

    def bounds(there):
        low, high = jnp.where(there, place, NEVER).min(-1), jnp.where(there, place + 1, 0).max(-1)
        return jnp.minimum(low, high), high

    def of_block(block):
        some, full = kinds(*block)
        a0 = a1 = jnp.zeros(others[0], jnp.int32)
        if front is not None:
            rest = place >= front[:, None]
            a0, a1 = bounds(some & ~rest)
            some, full = some & rest, full & rest
        (start, stop), (f0, f1) = bounds(some), bounds(full)
        side_by_side = (f0 < f1) & (full.sum(-1) == f1 - f0)
        return jnp.stack(
            [a0, a1, start, *(jnp.where(side_by_side, f, start) for f in (f0, f1)), stop], axis=1
        )

    own = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0)[..., None], own)
    return jnp.moveaxis(
        jax.lax.map(of_block, own, batch_size=max(1, PAIRS_AT_ONCE // math.prod(others))), 0, 2
    )


# ---------------------------------------------------------------- kernels
def _visit(spans, some, pair, carry):
    """Runs carry = pair(j, masked, carry) for the active blocks j, those that need no mask first
    and without a branch, so that their operands can be fetched ahead.
    """
    a0, a1, start, f0, f1, stop = (spans[i] for i in range(6))
    carry = jax.lax.fori_loop(f0, f1, lambda j, carry: pair(j, False, carry), carry)
    front, left = a1 - a0, f0 - start

    def edge(n, carry):
        j = jnp.where(
            n < front, a0 + n, jnp.where(n < front + left, start + n - front, f1 + n - front - left)
        )
        return jax.lax.cond(some(j), lambda carry: pair(j, True, carry), lambda carry: carry, carry)

    return jax.lax.fori_loop(0, front + left + stop - f1, edge, carry)


def _block_range(range_ref, *j):
    return [[range_ref[(i, c, *j)] for c in range(range_ref.shape[1])] for i in (0, 1)]


def _tokens(ref, at, axis: int):
    """What is compared of the tokens `at`, each a range of one: twice C arrays, with an axis of one
    at `axis`.
    """
    return [[jnp.expand_dims(ref[c, at], axis) for c in range(ref.shape[0])]] * 2


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    q_rows,
    k_rows,
    q_range,
    k_range,
    spans,
    out_ref,
    lse_ref,
    *,
    bk,
    window,
    scale,
    softcap,
):
    """A block of queries of one head: q, out [bq, H], lse [bq]; all keys of its head: k, v [S,
    H].
    """
    q, (bq, H) = q_ref[...], q_ref.shape
    q_own, q_tokens = _block_range(q_range), _tokens(q_rows, slice(None), 1)

    def pair(j, masked, carry):
        top, total, out = carry
        at = pl.ds(j * bk, bk)
        scores = capped(plgpu.dot(q, k_ref[at, :], trans_b=True) * (scale * LOG2_E), softcap)
        if masked:
            scores = jnp.where(_some(window, q_tokens, _tokens(k_rows, at, 0)), scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), v_ref[at, :])
        return new_top, total * shrink + weights.sum(-1), out

    # float32: the running sums of a long row
    empty = (
        jnp.full((bq,), FLOOR, jnp.float32),
        jnp.zeros((bq,), jnp.float32),
        jnp.zeros((bq, H), jnp.float32),
    )
    some = lambda j: _some(window, q_own, _block_range(k_range, j))
    top, total, out = _visit(spans, some, pair, empty)
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(nothing, FLOOR, (top + jnp.log2(total)) / LOG2_E)


def _dq_kernel(
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    q_rows,
    k_rows,
    q_range,
    k_range,
    spans,
    dq_ref,
    *,
    bk,
    window,
    scale,
    softcap,
):
    """The gradient of a block of queries of one head; shapes as in `_forward_kernel`."""
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...] * LOG2_E, delta_ref[...]
    q_own, q_tokens = _block_range(q_range), _tokens(q_rows, slice(None), 1)

    def pair(j, masked, dq):
        at = pl.ds(j * bk, bk)
        k = k_ref[at, :]
        scores = capped(plgpu.dot(q, k, trans_b=True) * (scale * LOG2_E), softcap)
        if masked:
            scores = jnp.where(_some(window, q_tokens, _tokens(k_rows, at, 0)), scores, MASKED)
        weights = jnp.exp2(scores - lse[:, None])
        d_weights = plgpu.dot(d_out, v_ref[at, :], trans_b=True)
        d_scores = through_cap(weights * (d_weights - delta[:, None]), scores, softcap)
        return dq + plgpu.dot(d_scores.astype(k.dtype), k)

    some = lambda j: _some(window, q_own, _block_range(k_range, j))
    dq_ref[...] = (_visit(spans, some, pair, jnp.zeros(q.shape, jnp.float32)) * scale).astype(
        dq_ref.dtype
    )


def _dkv_kernel(
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    q_rows,
    k_rows,
    q_range,
    k_range,
    spans,
    dk_ref,
    dv_ref,
    *,
    bq,
    window,
    scale,
    softcap,
):
    """The gradients of a block of keys [bk, H] of one key/value head, summed over the R query heads
    that read it: q, d_out [T, R, H], lse, delta [R, T]. Weights are [bk, bq], so that none is ever
    transposed.
    """
    k, v = k_ref[...], v_ref[...]
    k_own, k_tokens = _block_range(k_range), _tokens(k_rows, slice(None), 1)
    some = lambda i: _some(window, _block_range(q_range, i), k_own)

    def head(r, carry):
        def pair(i, masked, carry):
            dk, dv = carry
            at = pl.ds(i * bq, bq)
            q, d_out, lse, delta = (
                q_ref[at, r, :],
                d_out_ref[at, r, :],
                lse_ref[r, at] * LOG2_E,
                delta_ref[r, at],
            )
            scores = capped(plgpu.dot(k, q, trans_b=True) * (scale * LOG2_E), softcap)
            if masked:
                scores = jnp.where(_some(window, _tokens(q_rows, at, 0), k_tokens), scores, MASKED)
            weights = jnp.exp2(scores - lse[None])
            dv += plgpu.dot(weights.astype(d_out.dtype), d_out)
            d_scores = through_cap(
                weights * (plgpu.dot(v, d_out, trans_b=True) - delta[None]), scores, softcap
            )
            return dk + plgpu.dot(d_scores.astype(q.dtype), q), dv

        return _visit(spans, some, pair, carry)

    # float32: sums over every query of every head
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], head, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[...], dv_ref[...] = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
