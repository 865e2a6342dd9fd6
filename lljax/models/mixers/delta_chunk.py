"""A chunk of C tokens of one head under the gated delta rule, forward and backward, in operations
that a Pallas kernel may hold: matrices of two axes, and masks in place of slices.

Letters and mathematics as in lljax.models.mixers.delta_rule. With D the decays between tokens, f
from the state before the chunk to a token and e from a token to the end of the chunk:

    (I + A) W = beta (V - f K S)      A = beta (K K^T) D below the diagonal
    O = f Q S + P W                   P = (Q K^T) D
    S' = f_last S + (e K)^T W

W, the corrected values, is what the tokens add to the state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lljax.models.mixers.delta_rule import CHUNK

BLOCK = 8  # rows of a register: within them the triangular matrix is inverted row by row


class TokenMasks(NamedTuple):
    """visible: whether a token [row] sees another [column]. continues: whether it reads the state
    before the chunk.
    """

    visible: Bool[Array, "C C"]
    continues: Bool[Array, "C 1"]

    @staticmethod
    def of(marks: Int[Array, "2 C"]) -> "TokenMasks":
        """marks: the segment of each token, and of the state before the chunk."""
        # Exact in float32: segments are documents of a row.
        segments, known = marks[:1].astype(jnp.float32), marks[1:].astype(jnp.float32)
        places = column(segments)
        return TokenMasks((places == segments) & _lower(), places == column(known))


class Gates(NamedTuple):
    """The decays and the strength of one head."""

    between: Float[Array, "C C"]  # D
    from_start: Float[Array, "C 1"]  # f
    to_end: Float[Array, "C 1"]  # e
    keep: Float[Array, "1 1"]  # f of the last token
    beta: Float[Array, "C 1"]
    visible: Bool[Array, "C C"]


def gates(decay: Float[Array, "1 C"], beta: Float[Array, "1 C"], masks: TokenMasks) -> Gates:
    total = jnp.sum(jnp.where(masks.visible, decay, 0.0), axis=1, keepdims=True)
    between = jnp.exp(jnp.where(masks.visible, total - row(total), -jnp.inf))
    from_start = jnp.where(masks.continues, jnp.exp(total), 0.0)
    return Gates(
        between=between,
        from_start=from_start,
        to_end=column(between[CHUNK - 1 :]),
        keep=from_start[CHUNK - 1 :],
        beta=column(beta),
        visible=masks.visible,
    )


# ---------------------------------------------------------------- the triangular inverse
def system(likeness: Float[Array, "C C"], gates: Gates) -> Float[Array, "C C"]:
    """A. likeness: K K^T."""
    return jnp.where(_lower(strict=True), gates.beta * likeness * gates.between, 0.0)


def inverse(system: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """The inverse of I + system, for a system that is zero on and above the diagonal.

    Substitution in blocks of 8 rows, then of two inverses X and Z of blocks that of [[X, 0],
    [Y, Z]] is [[X, 0], [-Z Y X, Z]]. All in float32, as exact as substitution: a series of powers
    would not be, because those of keys that are alike grow large before they vanish.
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
    out = jnp.where(rows == columns, 1.0, 0.0).reshape(-1, BLOCK, CHUNK)
    for j in range(BLOCK - 1):
        here = columns == (rows & -BLOCK) + j
        factor = jnp.sum(jnp.where(here, system, 0.0), axis=1, keepdims=True)
        out -= factor.reshape(-1, BLOCK, 1) * out[:, j : j + 1]
    size = BLOCK
    while size < CHUNK:
        lower = out.reshape(-1, 2, size, CHUNK)[:, 1].reshape(-1, CHUNK)  # Z
        # The block to the left of each second block on the diagonal.
        beside = (rows & size != 0) & (columns & -size == (rows & -size) - size)
        y = jnp.where(beside, system, 0.0).reshape(-1, 2, size, CHUNK)[:, 1].reshape(-1, CHUNK)
        yx = dot(y, out.reshape(CHUNK, CHUNK), 1, 0).reshape(-1, 1, size, CHUNK)
        yx = jnp.concatenate([jnp.zeros_like(yx), yx], axis=1).reshape(CHUNK, CHUNK)
        lower -= dot(lower, yx, 1, 0)
        upper = out.reshape(-1, 2, size, CHUNK)[:, :1]
        out = jnp.concatenate([upper, lower.reshape(upper.shape)], axis=1)
        size *= 2
    return out.reshape(CHUNK, CHUNK)


# ---------------------------------------------------------------- forward
def outputs(
    q: Float[Array, "C k"],
    k: Float[Array, "C k"],
    v: Float[Array, "C v"],
    likeness: Float[Array, "C C"],
    gates: Gates,
    inverse: Float[Array, "C C"],
    state: Float[Array, "k v"],
) -> tuple[Float[Array, "C v"], Float[Array, "C v"]]:
    """The outputs and the corrected values. likeness: Q K^T."""
    read = dot(jnp.concatenate([k, q]), state.astype(q.dtype), 1, 0)
    added = corrected(inverse, gates, v.astype(jnp.float32) - gates.from_start * read[:CHUNK])
    scores = (likeness * gates.between).astype(q.dtype)
    out = gates.from_start * read[CHUNK:] + dot(scores, added.astype(q.dtype), 1, 0)
    return out, added


def error(k: jax.Array, v: jax.Array, gates: Gates, state: jax.Array) -> Float[Array, "C v"]:
    """What the values differ by from what the state before the chunk has for their keys."""
    return v.astype(jnp.float32) - gates.from_start * dot(k, state.astype(k.dtype), 1, 0)


def corrected(inverse: jax.Array, gates: Gates, error: jax.Array) -> Float[Array, "C v"]:
    return dot(inverse, gates.beta * error, 1, 0)


def state_after(
    k: jax.Array, gates: Gates, corrected: jax.Array, state: jax.Array
) -> Float[Array, "k v"]:
    added = dot((gates.to_end * k).astype(k.dtype), corrected.astype(k.dtype), 0, 0)
    return gates.keep * state + added


# ---------------------------------------------------------------- backward
class HeadGradients(NamedTuple):
    """Of one value head. q and k: without what it gives through the likenesses; those are apart,
    because the value heads of a key head have them in common.
    """

    v: Float[Array, "C v"]
    decay: Float[Array, "1 C"]
    beta: Float[Array, "1 C"]
    state: Float[Array, "k v"]
    q: Float[Array, "C k"]
    k: Float[Array, "C k"]
    likeness_q: Float[Array, "C C"]
    likeness_k: Float[Array, "C C"]


class Shared(NamedTuple):
    """What value heads of a key head share, and the sums of their gradients of it."""

    q: Float[Array, "C k"]
    k: Float[Array, "C k"]
    likeness_q: Float[Array, "C C"]  # Q K^T
    likeness_k: Float[Array, "C C"]  # K K^T
    sums: tuple[Any, Any, Any, Any] = (0.0, 0.0, 0.0, 0.0)  # q, k, likeness_q, likeness_k

    @staticmethod
    def of(q: jax.Array, k: jax.Array) -> "Shared":
        return Shared(q, k, dot(q, k, 1, 1), dot(k, k, 1, 1))

    def plus(self, head: HeadGradients) -> "Shared":
        more = head.q, head.k, head.likeness_q, head.likeness_k
        q, k, of_q, of_k = (a + b for a, b in zip(self.sums, more, strict=True))
        return self._replace(sums=(q, k, of_q, of_k))

    def gradients(self) -> tuple[Float[Array, "C k"], Float[Array, "C k"]]:
        q, k, of_q, of_k = self.sums
        of_q, of_k = of_q.astype(self.q.dtype), of_k.astype(self.q.dtype)
        k += dot(of_k, self.k, 1, 0) + dot(of_k, self.k, 0, 0) + dot(of_q, self.q, 0, 0)
        return q + dot(of_q, self.k, 1, 0), k


def backward(
    shared: Shared,
    gates: Gates,
    *,
    v: Float[Array, "C v"],
    inverse: Float[Array, "C C"],
    corrected: Float[Array, "C v"],
    state: Float[Array, "k v"],
    d_out: Float[Array, "C v"],
    d_after: Float[Array, "k v"],
) -> HeadGradients:
    """state: before the chunk. d_after: the gradient of the state after it."""
    q, k, dtype = shared.q, shared.k, shared.q.dtype
    between, from_start, to_end, keep, beta, visible = gates
    narrow_state, narrow_after = state.astype(dtype), d_after.astype(dtype)
    scores = shared.likeness_q * between
    below = _lower(strict=True)

    read = dot(jnp.concatenate([k, q]), narrow_state, 1, 0)
    read_k, read_q = read[:CHUNK], read[CHUNK:]
    d_corrected = dot(scores.astype(dtype), d_out, 0, 0)
    d_corrected += dot((to_end * k).astype(dtype), narrow_after, 1, 0)
    d_solved = dot(inverse, d_corrected, 0, 0)  # of beta times the error
    d_error = beta * d_solved

    d_scores = dot(d_out, corrected, 1, 1)
    d_system = jnp.where(below, -dot(d_solved.astype(dtype), corrected, 1, 1), 0.0)
    of_system = d_system * shared.likeness_k * between
    wide_out = d_out.astype(jnp.float32)
    d_read_q = (from_start * wide_out).astype(dtype)
    d_read_k = (-from_start * d_error).astype(dtype)
    d_both = dot(jnp.concatenate([d_read_k, d_read_q]), narrow_state, 1, 1)
    d_ended = dot(corrected, narrow_after, 1, 1)  # of to_end times k

    d_beta = _sum(d_solved * (v.astype(jnp.float32) - from_start * read_k)) + _sum(of_system)
    d_from_start = _sum(wide_out * read_q) - _sum(d_error * read_k)
    ended = _sum(d_ended * k) * to_end
    d_between = d_scores * scores + of_system * beta  # times `between`
    d_total = _sum(d_between) - column(jnp.sum(d_between, axis=0, keepdims=True))
    d_total += d_from_start * from_start - ended
    d_keep = jnp.sum(_sum(d_after * state), axis=0, keepdims=True)
    last = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0) == CHUNK - 1
    d_total += jnp.where(last, jnp.sum(ended, axis=0, keepdims=True) + d_keep * keep, 0.0)
    return HeadGradients(
        v=d_error,
        decay=jnp.sum(jnp.where(visible, d_total, 0.0), axis=0, keepdims=True),
        beta=row(d_beta),
        state=keep * d_after
        + dot(jnp.concatenate([k, q]), jnp.concatenate([d_read_k, d_read_q]), 0, 0),
        q=d_both[CHUNK:],
        k=d_both[:CHUNK] + to_end * d_ended,
        likeness_q=d_scores * between,
        likeness_k=d_system * beta * between,
    )


# ---------------------------------------------------------------- small ones
def dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """The product of two matrices over one axis of each, summed in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision="highest" if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def column(x: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    return jnp.sum(jnp.where(_diagonal(), x, 0.0), axis=1, keepdims=True)


def row(x: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    return jnp.sum(jnp.where(_diagonal(), x, 0.0), axis=0, keepdims=True)


def _sum(x: Float[Array, "C x"]) -> Float[Array, "C 1"]:
    return jnp.sum(x, axis=1, keepdims=True)


def _diagonal() -> Bool[Array, "C C"]:
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
    return rows == columns


def _lower(strict: bool = False) -> Bool[Array, "C C"]:
    """Of a token as row and one before it as column; also itself if not `strict`."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
    return rows > columns if strict else rows >= columns
