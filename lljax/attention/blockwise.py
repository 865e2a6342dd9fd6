"""Flash attention in plain XLA: right on every platform, and the default where no kernel serves.

Queries and keys are cut into blocks. Each query block visits only the key blocks that the mask
leaves active, keeping a running softmax (Dao et al. 2022, arXiv 2205.14135, algorithm 1); the
backward pass recomputes the weights of a block from the saved log-sum-exp (Dao 2023, arXiv
2307.08691, algorithm 2). Memory is O(T), work follows the mask.
"""

import functools

import jax
import jax.numpy as jnp

from lljax.attention.mask import Mask, block, block_kinds, pad, visible
from lljax.attention.softcap import capped, through_cap

# exp(MASKED - FLOOR) is 0, so a row masked throughout a block adds nothing
MASKED, FLOOR = -1e30, -1e20


def forward(
    q, k, v, mask: Mask, *, scale: float, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H]: the output, like q, and the log-sum-exp
    of each query's scores, float32 [B, T, N]. A query that sees nothing gets zeros, and FLOOR.
    """
    call = _Call(q, k, v, mask, scale)
    out, lse = _forward(*call.blocks, softcap, call.q, call.k, call.v, call.mask)
    return call.rows(out), call.rows(lse)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` for q, k and v in `dtype`, given its results and the gradient of its
    output.

    `out` and `lse` may be those of attention over more keys than `k`: the sum over parts of the
    keys is the gradient.
    """
    call = _Call(q, k, v, mask, scale)
    dq, dk, dv = _backward(
        *call.blocks,
        softcap,
        call.q,
        call.k,
        call.v,
        call.mask,
        call.heads(out),
        call.heads(lse[..., None])[..., 0],
        call.heads(d_out),
    )
    return tuple(x.astype(dtype) for x in (call.rows(dq) * scale, call.keys(dk), call.keys(dv)))


class _Call:
    """The operands in the order that the loops want, padded to whole blocks: q [B, K, T, N / K, H]
    (scaled), k, v [B, K, S, H]; and the way back.
    """

    def __init__(self, q, k, v, mask: Mask, scale: float):
        self.B, self.T, self.N, self.S = *q.shape[:3], k.shape[1]
        self.K, self.places = k.shape[2], None
        if mask.anchors is not None:
            k, v, mask, self.places = anchors_first(k, v, mask)
        self.blocks = bq, bk = block_sizes(self.T, self.S, mask)
        self.T_pad, S_pad = -(-self.T // bq) * bq, -(-self.S // bk) * bk
        self.q = self.heads(q * scale)
        self.k, self.v = (jnp.moveaxis(_pad(x, S_pad), 2, 1) for x in (k, v))
        self.mask = pad(mask, self.T_pad, S_pad)

    def heads(self, x):  # [B, T, N, H] -> [B, K, T, N / K, H]
        return jnp.moveaxis(
            _pad(x, self.T_pad).reshape(self.B, self.T_pad, self.K, -1, x.shape[-1]), 2, 1
        )

    def rows(self, x):  # [B, K, T, N / K, ...] -> [B, T, N, ...]
        return jnp.moveaxis(x, 1, 2).reshape(self.B, self.T_pad, self.N, *x.shape[4:])[:, : self.T]

    def keys(self, x):  # [B, K, H, S] -> [B, S, K, H]
        x = jnp.moveaxis(x, 3, 1)[:, : self.S]
        return (
            x
            if self.places is None
            else jnp.take_along_axis(x, self.places[:, :, None, None], axis=1)
        )


def _pad(x, length):
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def anchors_first(k, v, mask: Mask):
    """Moves the anchors to the front of the keys, so that they fill few blocks wherever they stood
    in the row.

    The mask is decided from indices that move along, so the result does not change; the work does:
    a marker in every paragraph would otherwise keep every block active. Returns where each key
    went, too: int32 [B, S].
    """
    order = jnp.argsort(~mask.anchors, axis=1, stable=True)
    move = functools.partial(jnp.take_along_axis, indices=order, axis=1)
    segments = None if mask.k_segments is None else move(mask.k_segments)
    k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (k, v))
    moved = mask.replace(
        k_index=move(mask.k_index), k_segments=segments, anchors=move(mask.anchors)
    )
    return k, v, moved, _places(mask.anchors)


def _places(anchors) -> jax.Array:
    """The inverse of that order. Counted, for a sort takes a TPU compiler seconds."""
    before = jnp.cumsum(anchors, axis=1, dtype=jnp.int32)
    others = before[:, -1:] + jnp.arange(anchors.shape[1], dtype=jnp.int32) - before
    return jnp.where(anchors, before - 1, others)


def block_sizes(T: int, S: int, mask: Mask) -> tuple[int, int]:
    """Blocks small enough that a group or window is not rounded up to much more work than it
    holds.
    """
    reach = min(size for size in (mask.group, mask.window, S) if size is not None)
    size = 256
    while size > 64 and size * 8 > reach:
        size //= 2
    return min(size, T), min(size, S)


def _visit(mask, bq, bk):
    """Returns visit(i, body, carry): body(j, masked, carry) for each key block j that query block i
    may see.

    Blocks that need no mask come first and are told apart when the program is built, so that they
    do not pay for one.
    """
    empty, full = block_kinds(mask, bq, bk)
    order = jnp.argsort(jnp.where(full, 0, jnp.where(empty, 2, 1)), axis=1, stable=True).astype(
        jnp.int32
    )
    full, some = full.sum(1, dtype=jnp.int32), (~empty).sum(1, dtype=jnp.int32)

    def visit(i, body, carry):
        carry = jax.lax.fori_loop(
            0, full[i], lambda n, carry: body(order[i, n], False, carry), carry
        )
        return jax.lax.fori_loop(
            full[i], some[i], lambda n, carry: body(order[i, n], True, carry), carry
        )

    return visit


def _scores(q, k, mask, masked: bool, softcap):
    """Scores [B, K, bq, N / K, bk] of a pair of blocks, in float32 as the softmax needs."""
    scores = capped(
        jnp.einsum("BKQRH,BKSH->BKQRS", q, k, preferred_element_type=jnp.float32), softcap
    )
    return jnp.where(visible(mask())[:, None, :, None, :], scores, MASKED) if masked else scores


def _slice(x, i, size, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _forward(bq, bk, softcap, q, k, v, mask):
    """Returns the output, like q, and the log-sum-exp [B, K, T, N / K]."""
    visit = _visit(mask, bq, bk)
    B, K, T, R, H = q.shape

    def query_block(_, i):
        qi = _slice(q, i, bq)

        def key_block(j, masked, carry):
            top, total, out = carry
            scores = _scores(
                qi, _slice(k, j, bk), lambda: block(mask, i * bq, bq, j * bk, bk), masked, softcap
            )
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + jnp.einsum(
                "BKQRS,BKSH->BKQRH",
                weights.astype(v.dtype),
                _slice(v, j, bk),
                preferred_element_type=jnp.float32,
            )
            return new_top, total * shrink + weights.sum(-1), out

        # float32: the running sums of a long row
        empty = (
            jnp.full((B, K, bq, R), FLOOR),
            jnp.zeros((B, K, bq, R)),
            jnp.zeros((B, K, bq, R, H)),
        )
        top, total, out = visit(i, key_block, empty)
        total = jnp.where(total == 0.0, 1.0, total)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(T // bq))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape), jnp.moveaxis(lse, 0, 2).reshape(B, K, T, R)


def _backward(bq, bk, softcap, q, k, v, mask, out, lse, d_out):
    """Returns float32 gradients: of q, like q; of k and v as [B, K, H, S]."""
    visit = _visit(mask, bq, bk)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # dk and dv are summed as [.., H, S]: products with small transposed operands, where a CPU is
    # slow at transposing the weights of a block.
    qt, d_out_t = (jnp.moveaxis(x, -1, 2) for x in (q, d_out))

    def query_block(carry, i):
        qi, doi, lsei, deltai = (_slice(x, i, bq) for x in (q, d_out, lse, delta))
        qti, doti = (_slice(x, i, bq, axis=3) for x in (qt, d_out_t))

        def key_block(j, masked, carry):
            dqi, dk, dv = carry
            kj, vj = _slice(k, j, bk), _slice(v, j, bk)
            scores = _scores(qi, kj, lambda: block(mask, i * bq, bq, j * bk, bk), masked, softcap)
            weights = jnp.exp(scores - lsei[..., None])
            d_weights = wide("BKQRH,BKSH->BKQRS", doi, vj)
            d_scores = through_cap(
                weights * (d_weights - deltai[..., None]), scores, softcap
            ).astype(q.dtype)
            dqi += wide("BKQRS,BKSH->BKQRH", d_scores, kj)
            dk = _add_at(dk, j, bk, wide("BKHQR,BKQRS->BKHS", qti, d_scores))
            dv = _add_at(dv, j, bk, wide("BKHQR,BKQRS->BKHS", doti, weights.astype(q.dtype)))
            return dqi, dk, dv

        dqi, dk, dv = visit(i, key_block, (jnp.zeros(qi.shape, jnp.float32), *carry))
        return (dk, dv), dqi

    # float32: sums over every query block
    empty = tuple(jnp.zeros(jnp.moveaxis(x, 3, 2).shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, empty, jnp.arange(q.shape[2] // bq))
    return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk, dv


def _add_at(x, j, size, update):
    return jax.lax.dynamic_update_slice_in_dim(
        x, _slice(x, j, size, axis=3) + update, j * size, axis=3
    )
