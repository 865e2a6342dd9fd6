"""Flash attention in plain XLA: right on every platform, and the default where no kernel serves.

Queries and keys are cut into blocks. Each query block visits only the key blocks that the mask leaves active, keeping
a running softmax (Dao et al. 2022, arXiv 2205.14135, algorithm 1); the backward pass recomputes the weights of a block
from the saved log-sum-exp (Dao 2023, arXiv 2307.08691, algorithm 2). Memory is O(T), work follows the mask.
"""

import functools

import jax
import jax.numpy as jnp

from lljax.attention.mask import Mask, block, block_kinds, pad, visible

MASKED, FLOOR = -1e30, -1e20                 # exp(MASKED - FLOOR) is 0, so a row masked throughout a block adds nothing


def attend(q, k, v, mask: Mask, *, scale: float) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H]; returns [B, T, N, H]. A query that sees nothing gets zeros."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if mask.anchors is not None:
        k, v, mask = anchors_first(k, v, mask)
    bq, bk = block_sizes(T, S, mask)
    T_pad, S_pad = -(-T // bq) * bq, -(-S // bk) * bk

    def heads_first(x, heads, length):       # [B, length, heads..., H] -> [B, K, length, ..., H]
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(B, length, K, *heads, H), 2, 1)

    out = _attend(bq, bk, heads_first(q * scale, (N // K,), T_pad), heads_first(k, (), S_pad),
                  heads_first(v, (), S_pad), pad(mask, T_pad, S_pad))
    return jnp.moveaxis(out, 1, 2).reshape(B, T_pad, N, H)[:, :T]


def anchors_first(k, v, mask: Mask):
    """Moves the anchors to the front of the keys, so that they fill few blocks wherever they stood in the row.

    The mask is decided from indices that move along, so the result does not change; the work does: a marker in every
    paragraph would otherwise keep every block active.
    """
    order = jnp.argsort(~mask.anchors, axis=1, stable=True)
    move = functools.partial(jnp.take_along_axis, indices=order, axis=1)
    segments = None if mask.k_segments is None else move(mask.k_segments)
    k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (k, v))
    return k, v, mask.replace(k_index=move(mask.k_index), k_segments=segments, anchors=move(mask.anchors))


def block_sizes(T: int, S: int, mask: Mask) -> tuple[int, int]:
    """Blocks small enough that a group or window is not rounded up to much more work than it holds."""
    reach = min(size for size in (mask.group, mask.window, S) if size is not None)
    size = 256
    while size > 64 and size * 8 > reach:
        size //= 2
    return min(size, T), min(size, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(bq, bk, q, k, v, mask):
    return _forward(bq, bk, q, k, v, mask)[0]


def _visit(mask, bq, bk):
    """Returns visit(i, body, carry): body(j, masked, carry) for each key block j that query block i may see.

    Blocks that need no mask come first and are told apart when the program is built, so that they do not pay for one.
    """
    empty, full = block_kinds(mask, bq, bk)
    order = jnp.argsort(jnp.where(full, 0, jnp.where(empty, 2, 1)), axis=1, stable=True).astype(jnp.int32)
    full, some = full.sum(1, dtype=jnp.int32), (~empty).sum(1, dtype=jnp.int32)

    def visit(i, body, carry):
        carry = jax.lax.fori_loop(0, full[i], lambda n, carry: body(order[i, n], False, carry), carry)
        return jax.lax.fori_loop(full[i], some[i], lambda n, carry: body(order[i, n], True, carry), carry)
    return visit


def _scores(q, k, mask, masked: bool):
    """Scores [B, K, bq, N / K, bk] of a pair of blocks, in float32 as the softmax needs."""
    scores = jnp.einsum("BKQRH,BKSH->BKQRS", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible(mask())[:, None, :, None, :], scores, MASKED) if masked else scores


def _slice(x, i, size, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _forward(bq, bk, q, k, v, mask):
    """q [B, K, T, N / K, H], scaled; k, v [B, K, S, H]. Returns the output, like q, and the log-sum-exp of each
    query's scores [B, K, T, N / K]."""
    visit = _visit(mask, bq, bk)
    B, K, T, R, H = q.shape

    def query_block(_, i):
        qi = _slice(q, i, bq)

        def key_block(j, masked, carry):
            top, total, out = carry
            scores = _scores(qi, _slice(k, j, bk), lambda: block(mask, i * bq, bq, j * bk, bk), masked)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + jnp.einsum("BKQRS,BKSH->BKQRH", weights.astype(v.dtype), _slice(v, j, bk),
                                                       preferred_element_type=jnp.float32)
            return new_top, total * shrink + weights.sum(-1), out

        # float32: the running sums of a long row
        empty = (jnp.full((B, K, bq, R), FLOOR), jnp.zeros((B, K, bq, R)), jnp.zeros((B, K, bq, R, H)))
        top, total, out = visit(i, key_block, empty)
        total = jnp.where(total == 0.0, 1.0, total)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(T // bq))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape), jnp.moveaxis(lse, 0, 2).reshape(B, K, T, R)


def _attend_forward(bq, bk, q, k, v, mask):
    out, lse = _forward(bq, bk, q, k, v, mask)
    return out, (q, k, v, mask, out, lse)


def _attend_backward(bq, bk, saved, d_out):
    q, k, v, mask, out, lse = saved
    visit = _visit(mask, bq, bk)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # dk and dv are summed as [.., H, S]: products with small transposed operands, where a CPU is slow at transposing
    # the weights of a block.
    qt, d_out_t = (jnp.moveaxis(x, -1, 2) for x in (q, d_out))

    def query_block(carry, i):
        qi, doi, lsei, deltai = (_slice(x, i, bq) for x in (q, d_out, lse, delta))
        qti, doti = (_slice(x, i, bq, axis=3) for x in (qt, d_out_t))

        def key_block(j, masked, carry):
            dqi, dk, dv = carry
            kj, vj = _slice(k, j, bk), _slice(v, j, bk)
            weights = jnp.exp(_scores(qi, kj, lambda: block(mask, i * bq, bq, j * bk, bk), masked) - lsei[..., None])
            d_weights = wide("BKQRH,BKSH->BKQRS", doi, vj)
            d_scores = (weights * (d_weights - deltai[..., None])).astype(q.dtype)
            dqi += wide("BKQRS,BKSH->BKQRH", d_scores, kj)
            dk = _add_at(dk, j, bk, wide("BKHQR,BKQRS->BKHS", qti, d_scores))
            dv = _add_at(dv, j, bk, wide("BKHQR,BKQRS->BKHS", doti, weights.astype(q.dtype)))
            return dqi, dk, dv

        dqi, dk, dv = visit(i, key_block, (jnp.zeros(qi.shape, jnp.float32), *carry))
        return (dk, dv), dqi.astype(q.dtype)

    # float32: sums over every query block
    empty = tuple(jnp.zeros(jnp.moveaxis(x, 3, 2).shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, empty, jnp.arange(q.shape[2] // bq))
    dk, dv = (jnp.moveaxis(x, 2, 3) for x in (dk, dv))
    return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


def _add_at(x, j, size, update):
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, j, size, axis=3) + update, j * size, axis=3)


_attend.defvjp(_attend_forward, _attend_backward)
