"""Flash attention in plain XLA: exact on every platform, and the default where no kernel serves.

Queries and keys are cut into blocks. A query block visits only the key blocks that the mask leaves
visible, with a running softmax (Dao et al. 2022, arXiv 2205.14135, algorithm 1); the backward pass
recomputes the weights of a block from the saved log-sum-exp (Dao 2023, arXiv 2307.08691, algorithm
2). Memory is O(T), work follows the mask.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.blocks import anchors_first, block_pairs, in_row_order, pad_tokens, reach
from lljax.attention.mask import Index, Mask, block, pad, visible
from lljax.attention.softcap import apply_softcap, softcap_gradient
from lljax.parallel.rounding import round_up

# exp(MASKED - FLOOR) is 0, so a query that is masked throughout a block adds nothing
MASKED, FLOOR = -1e30, -1e20


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of q over k and v: the output, like q, and the log-sum-exp of each query's scores,
    float32. A query that sees nothing gets zeros, and FLOOR.
    """
    call = _Call(q, k, v, mask, scale, softcap)
    out, lse = _forward(call)
    return call.rows(out), call.rows(lse)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    results: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    d_out: Float[Array, "B T N H"],
    *,
    scale: float,
    softcap: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of `forward` for q, k and v in `dtype`, given its results (output and log-sum-exp)
    and the gradient of its output.

    The results may be of attention over more keys than `k`: gradients over parts of the keys then
    add up to the whole.
    """
    call, (out, lse) = _Call(q, k, v, mask, scale, softcap), results
    dq, dk, dv = _backward(
        call, call.heads(out), call.heads(lse[..., None])[..., 0], call.heads(d_out)
    )
    dq, dk, dv = call.rows(dq) * scale, call.keys(dk), call.keys(dv)
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


class _Call:
    """The operands in the order that the loops want, padded to whole blocks: q [B, K, T, N / K, H]
    (scaled), k, v [B, K, S, H]; and the way back.
    """

    def __init__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float,
        softcap: float | None,
    ):
        self.B, self.T, self.N, self.S = *q.shape[:3], k.shape[1]
        self.K, self.softcap, self.places = k.shape[2], softcap, None
        if mask.anchors is not None:
            k, v, mask, self.places = anchors_first(k, v, mask)
        self.bq, self.bk = block_sizes(self.T, self.S, mask)
        self.T_pad, S_pad = round_up(self.T, self.bq), round_up(self.S, self.bk)
        self.q = self.heads(q * scale)
        self.k, self.v = (jnp.moveaxis(pad_tokens(x, S_pad), 2, 1) for x in (k, v))
        self.mask = pad(mask, self.T_pad, S_pad)

    def heads(self, x: jax.Array) -> jax.Array:  # [B, T, N, H] -> [B, K, T, N / K, H]
        x = pad_tokens(x, self.T_pad).reshape(self.B, self.T_pad, self.K, -1, x.shape[-1])
        return jnp.moveaxis(x, 2, 1)

    def rows(self, x: jax.Array) -> jax.Array:  # [B, K, T, N / K, ...] -> [B, T, N, ...]
        return jnp.moveaxis(x, 1, 2).reshape(self.B, self.T_pad, self.N, *x.shape[4:])[:, : self.T]

    def keys(self, x: jax.Array) -> jax.Array:  # [B, K, H, S] -> [B, S, K, H]
        return in_row_order(jnp.moveaxis(x, 3, 1)[:, : self.S], self.places)

    def mask_of(self, i: Index, j: Index) -> jax.Array:
        """The dense mask of query block i and key block j, [B, 1, bq, 1, bk]."""
        pair = block(self.mask, i * self.bq, self.bq, j * self.bk, self.bk)
        return visible(pair)[:, None, :, None, :]


def block_sizes(T: int, S: int, mask: Mask) -> tuple[int, int]:
    """Queries and keys of a block: small enough that a group or window is not rounded up to much
    more work than it holds.
    """
    size = 256
    while size > 64 and size * 8 > reach(mask, S):
        size //= 2
    return min(size, T), min(size, S)


def _visitor(call: _Call):
    """Returns visit(i, body, carry), which runs carry = body(j, masked, carry) for every key block
    j that query block i may see in any row of the batch.

    Blocks that need no mask come first, in a loop of their own, so that they do not pay for one.
    """
    visited, unmasked = block_pairs(call.mask, call.bq, call.bk)
    visited, unmasked = visited.any(0), unmasked.all(0)
    order = jnp.argsort(jnp.where(unmasked, 0, jnp.where(visited, 1, 2)), axis=1, stable=True)
    order = order.astype(jnp.int32)
    unmasked, visited = unmasked.sum(1, dtype=jnp.int32), visited.sum(1, dtype=jnp.int32)

    def visit(i: Index, body: Callable, carry):
        carry = jax.lax.fori_loop(
            0, unmasked[i], lambda n, carry: body(order[i, n], False, carry), carry
        )
        return jax.lax.fori_loop(
            unmasked[i], visited[i], lambda n, carry: body(order[i, n], True, carry), carry
        )

    return visit


def _scores(
    call: _Call, q: jax.Array, i: Index, j: Index, masked: bool
) -> Float[Array, "B K bq R bk"]:
    """Scores of query block i (q) and key block j, R = N / K, in float32 as the softmax needs."""
    k = _slice(call.k, j, call.bk)
    scores = jnp.einsum("BKQRH,BKSH->BKQRS", q, k, preferred_element_type=jnp.float32)
    scores = apply_softcap(scores, call.softcap)
    return jnp.where(call.mask_of(i, j), scores, MASKED) if masked else scores


def _slice(x: jax.Array, i: Index, size: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)


def _forward(call: _Call) -> tuple[jax.Array, jax.Array]:
    """The output, like call.q, and the log-sum-exp [B, K, T, N / K]."""
    visit = _visitor(call)
    q, v, bq, bk = call.q, call.v, call.bq, call.bk
    B, K, T, R, H = q.shape

    def query_block(_, i: Index):
        qi = _slice(q, i, bq)

        def key_block(j: Index, masked: bool, carry):
            top, total, out = carry
            scores = _scores(call, qi, i, j, masked)
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


def _backward(
    call: _Call, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 gradients: of the scaled q, like call.q; of k and v as [B, K, H, S]."""
    visit = _visitor(call)
    q, k, v, bq, bk = call.q, call.k, call.v, call.bq, call.bk
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # dk and dv are summed as [.., H, S]: products with small transposed operands. A CPU is slow at
    # transposing the weights of a block.
    qt, d_out_t = (jnp.moveaxis(x, -1, 2) for x in (q, d_out))

    def query_block(carry, i: Index):
        qi, doi, lsei, deltai = (_slice(x, i, bq) for x in (q, d_out, lse, delta))
        qti, doti = (_slice(x, i, bq, axis=3) for x in (qt, d_out_t))

        def key_block(j: Index, masked: bool, carry):
            dqi, dk, dv = carry
            kj, vj = _slice(k, j, bk), _slice(v, j, bk)
            scores = _scores(call, qi, i, j, masked)
            weights = jnp.exp(scores - lsei[..., None])
            d_weights = einsum("BKQRH,BKSH->BKQRS", doi, vj)
            d_scores = weights * (d_weights - deltai[..., None])
            d_scores = softcap_gradient(d_scores, scores, call.softcap).astype(q.dtype)
            dqi += einsum("BKQRS,BKSH->BKQRH", d_scores, kj)
            dk = _add_at(dk, j, bk, einsum("BKHQR,BKQRS->BKHS", qti, d_scores))
            dv = _add_at(dv, j, bk, einsum("BKHQR,BKQRS->BKHS", doti, weights.astype(q.dtype)))
            return dqi, dk, dv

        dqi, dk, dv = visit(i, key_block, (jnp.zeros(qi.shape, jnp.float32), *carry))
        return (dk, dv), dqi

    # float32: sums over every query block
    empty = tuple(jnp.zeros(jnp.moveaxis(x, 3, 2).shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, empty, jnp.arange(q.shape[2] // bq))
    return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk, dv


def _add_at(x: jax.Array, j: Index, size: int, update: jax.Array) -> jax.Array:
    at = j * size
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, j, size, axis=3) + update, at, axis=3)
