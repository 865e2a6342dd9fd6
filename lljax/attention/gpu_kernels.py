"""The Triton kernels of `lljax.attention.gpu`: forward, the gradient of queries, and the gradients
of keys and values.

Every kernel reads, after its own operands, k and v, and of the mask: q_rows [P, bq or T] and k_rows
[C, S or bk], the integers that it compares (`lljax.attention.blocks.compared`); q_range [2, P, I]
and k_range [2, C, J], the smallest and largest in each block; and spans [6], the bounds of its
loop.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lljax.attention.blocks import any_visible, token_visible
from lljax.attention.blockwise import FLOOR, MASKED
from lljax.attention.mask import Index
from lljax.attention.softcap import apply_softcap, softcap_gradient

LOG2_E = math.log2(math.e)  # the GPU has an instruction for powers of two only


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are made from products, and the names of the integers that the mask compares."""

    scale: float
    softcap: float | None
    q_names: tuple[str, ...]
    k_names: tuple[str, ...]

    def from_products(self, products: jax.Array) -> jax.Array:
        """Scores in base 2, soft-capped."""
        return apply_softcap(products * (self.scale * LOG2_E), self._cap)

    def uncapped_gradient(self, gradient: jax.Array, scores: jax.Array) -> jax.Array:
        return softcap_gradient(gradient, scores, self._cap)

    @property
    def _cap(self) -> float | None:
        return None if self.softcap is None else self.softcap * LOG2_E

    def query_tokens(self, rows, at, axis: int) -> dict:
        """The integers of the queries `at`, with an axis of one at `axis`."""
        return _tokens(rows, self.q_names, at, axis)

    def key_tokens(self, rows, at, axis: int) -> dict:
        return _tokens(rows, self.k_names, at, axis)

    def query_block(self, ranges, *i) -> dict:
        """The extremes of query block i, or of the only one."""
        return _extremes(ranges, self.q_names, *i)

    def key_block(self, ranges, *j) -> dict:
        return _extremes(ranges, self.k_names, *j)


def _tokens(rows, names: tuple[str, ...], at, axis: int) -> dict:
    return {name: jnp.expand_dims(rows[c, at], axis) for c, name in enumerate(names)}


def _extremes(ranges, names: tuple[str, ...], *block) -> dict:
    ends = enumerate(("_low", "_high"))
    return {name + end: ranges[(e, c, *block)] for e, end in ends for c, name in enumerate(names)}


def _visit(spans, active: Callable, pair: Callable, carry):
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
        return jax.lax.cond(
            active(j), lambda carry: pair(j, True, carry), lambda carry: carry, carry
        )

    return jax.lax.fori_loop(0, front + left + stop - f1, edge, carry)


def forward_kernel(*refs, bk: int, scores: Scores) -> None:
    """A block of queries of one head, q and out [bq, H], lse [bq], over all keys of its head, k and
    v [S, H].
    """
    q_ref, k_ref, v_ref, q_rows, k_rows, q_range, k_range, spans, out_ref, lse_ref = refs
    q, (bq, H) = q_ref[...], q_ref.shape
    block, tokens = scores.query_block(q_range), scores.query_tokens(q_rows, slice(None), 1)

    def pair(j: Index, masked: bool, carry):
        top, total, out = carry
        at = pl.ds(j * bk, bk)
        s = scores.from_products(plgpu.dot(q, k_ref[at, :], trans_b=True))
        if masked:
            s = jnp.where(token_visible(tokens, scores.key_tokens(k_rows, at, 0)), s, MASKED)
        new_top = jnp.maximum(top, s.max(-1))
        weights, shrink = jnp.exp2(s - new_top[:, None]), jnp.exp2(top - new_top)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), v_ref[at, :])
        return new_top, total * shrink + weights.sum(-1), out

    def active(j: Index):
        return any_visible(block, scores.key_block(k_range, j))

    # float32: the running sums of a long row
    empty = (
        jnp.full((bq,), FLOOR, jnp.float32),
        jnp.zeros((bq,), jnp.float32),
        jnp.zeros((bq, H), jnp.float32),
    )
    top, total, out = _visit(spans, active, pair, empty)
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(nothing, FLOOR, (top + jnp.log2(total)) / LOG2_E)


def dq_kernel(*refs, bk: int, scores: Scores) -> None:
    """The gradient of a block of queries of one head; shapes as in `forward_kernel`."""
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, *mask_refs, dq_ref = refs
    q_rows, k_rows, q_range, k_range, spans = mask_refs
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...] * LOG2_E, delta_ref[...]
    block, tokens = scores.query_block(q_range), scores.query_tokens(q_rows, slice(None), 1)

    def pair(j: Index, masked: bool, dq):
        at = pl.ds(j * bk, bk)
        k = k_ref[at, :]
        s = scores.from_products(plgpu.dot(q, k, trans_b=True))
        if masked:
            s = jnp.where(token_visible(tokens, scores.key_tokens(k_rows, at, 0)), s, MASKED)
        weights = jnp.exp2(s - lse[:, None])
        d_weights = plgpu.dot(d_out, v_ref[at, :], trans_b=True)
        d_s = scores.uncapped_gradient(weights * (d_weights - delta[:, None]), s)
        return dq + plgpu.dot(d_s.astype(k.dtype), k)

    def active(j: Index):
        return any_visible(block, scores.key_block(k_range, j))

    dq = _visit(spans, active, pair, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scores.scale).astype(dq_ref.dtype)


def dkv_kernel(*refs, bq: int, scores: Scores) -> None:
    """The gradients of a block of keys [bk, H] of one key/value head, summed over the R query heads
    that read it: q, d_out [T, R, H], lse, delta [R, T]. Weights are [bk, bq], so that none is ever
    transposed.
    """
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, *mask_refs, dk_ref, dv_ref = refs
    q_rows, k_rows, q_range, k_range, spans = mask_refs
    k, v = k_ref[...], v_ref[...]
    block, tokens = scores.key_block(k_range), scores.key_tokens(k_rows, slice(None), 1)

    def active(i: Index):
        return any_visible(scores.query_block(q_range, i), block)

    def head(r, carry):
        def pair(i: Index, masked: bool, carry):
            dk, dv = carry
            at = pl.ds(i * bq, bq)
            q, d_out = q_ref[at, r, :], d_out_ref[at, r, :]
            lse, delta = lse_ref[r, at] * LOG2_E, delta_ref[r, at]
            s = scores.from_products(plgpu.dot(k, q, trans_b=True))
            if masked:
                s = jnp.where(token_visible(scores.query_tokens(q_rows, at, 0), tokens), s, MASKED)
            weights = jnp.exp2(s - lse[None])
            dv += plgpu.dot(weights.astype(d_out.dtype), d_out)
            d_weights = plgpu.dot(v, d_out, trans_b=True)
            d_s = scores.uncapped_gradient(weights * (d_weights - delta[None]), s)
            return dk + plgpu.dot(d_s.astype(q.dtype), q), dv

        return _visit(spans, active, pair, carry)

    # float32: sums over every query of every head
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], head, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[...], dv_ref[...] = (dk * scores.scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
