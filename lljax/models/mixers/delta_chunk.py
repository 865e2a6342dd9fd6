"""Two chunks of tokens of one head under the gated delta rule, forward and backward, in operations
that a Pallas kernel for TPU may hold.

Letters and mathematics as in lljax.models.mixers.delta_rule. With D the decays between tokens, f
from the state before a chunk to a token and e from a token to the end of the chunk, a chunk is

    (I + A) W = beta X      X = V - f K S      A = beta (K K^T) D below the diagonal
    O = f Q S + P W         P = (Q K^T) D
    S' = f_last S + (e K)^T W

W, the corrected values, is what the tokens add to the state.

A register has 128 lanes, so matrices [C, C] of two chunks stand side by side, [C, 2C] ("packed");
arrays by token have the two one after the other, [2C, x].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from lljax.models.mixers.delta_rule import CHUNK

PAIR = 2 * CHUNK
BLOCK = 8  # rows of a register: blocks of so many are inverted by substitution


class TokenMasks(NamedTuple):
    """visible: whether a token [row] sees another of its chunk [lane]. continues: whether it reads
    the state before the chunk.
    """

    visible: Bool[Array, "C 2C"]
    continues: Bool[Array, "2C 1"]

    @staticmethod
    def of(marks: Int[Array, "2 2C"]) -> "TokenMasks":
        """marks: the segment of each token, and of the state before its chunk."""
        marks = marks.astype(jnp.float32)  # exact: they number the documents of a row
        segments = column(marks[:1])
        visible = (wide(segments) == marks[:1]) & (_rows() >= _columns())
        return TokenMasks(visible, segments == column(marks[1:]))


class Gates(NamedTuple):
    """The decays of one head."""

    between: Float[Array, "C 2C"]  # D
    from_start: Float[Array, "2C 1"]  # f
    to_end: Float[Array, "2C 1"]  # e


def gates(decay: Float[Array, "1 2C"], masks: TokenMasks) -> Gates:
    total = half_sums(jnp.where(masks.visible, decay, 0.0))
    between = jnp.exp(jnp.where(masks.visible, wide(total) - row(total), -jnp.inf))
    from_start = jnp.where(masks.continues, jnp.exp(total), 0.0)
    return Gates(between, from_start, to_end=column(between[CHUNK - 1 :]))


# ---------------------------------------------------------------- forward
def read(q: jax.Array, k: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K S and Q S of a chunk."""
    out = dot(jnp.concatenate([k, q]), state.astype(q.dtype))
    return out[: len(k)], out[len(k) :]


def state_after(
    k: Float[Array, "C k"],
    to_end: Float[Array, "C 1"],
    keep: Float[Array, "1 1"],
    corrected: Float[Array, "C v"],
    state: Float[Array, "k v"],
) -> Float[Array, "k v"]:
    ended = (to_end * k).astype(k.dtype)
    return keep * state + dot(ended, corrected.astype(k.dtype), 0, 0)


# ---------------------------------------------------------------- backward
class Shared(NamedTuple):
    """What the value heads of a key head have in common, and the sums of its gradients."""

    q: Float[Array, "2C k"]
    k: Float[Array, "2C k"]
    likeness_q: Float[Array, "C 2C"]  # Q K^T
    likeness_k: Float[Array, "C 2C"]  # K K^T
    visible: Bool[Array, "C 2C"]

    @staticmethod
    def of(q: jax.Array, k: jax.Array, masks: TokenMasks) -> "Shared":
        return Shared(q, k, likeness(q, k), likeness(k, k), masks.visible)


class Chain(NamedTuple):
    """What the gradient of the state, on its way from the last chunk to the first, leaves in two
    chunks, by token.
    """

    solved: Float[Array, "2C v"]  # the gradient of beta X
    q: Float[Array, "2C k"]  # of q and k, through the products with the state
    k: Float[Array, "2C k"]
    ended: Float[Array, "2C k"]  # the gradient of e K
    kept: Float[Array, "2C 1"]  # in the last token of a chunk: of the logarithm of its decay


def back_through_state(
    q: Float[Array, "C k"],
    k: Float[Array, "C k"],
    from_start: Float[Array, "C 1"],
    to_end: Float[Array, "C 1"],
    beta: Float[Array, "C 1"],
    *,
    factor: Float[Array, "C 2C"],
    corrected: Float[Array, "C v"],
    state: Float[Array, "k v"],
    d_out: Float[Array, "C v"],
    d_corrected: Float[Array, "C v"],
    d_after: Float[Array, "k v"],
) -> tuple[Chain, Float[Array, "k v"]]:
    """One chunk of a `Chain`, and the gradient of the state before it.

    d_corrected: the gradient of W through the outputs. d_after: of the state after the chunk.
    """
    dtype, after = q.dtype, d_after.astype(q.dtype)
    d_corrected += dot((to_end * k).astype(dtype), after)
    solved = apply_transposed(factor, d_corrected)
    of_reads = [(-from_start * beta * solved).astype(dtype), (from_start * d_out).astype(dtype)]
    of_reads = jnp.concatenate(of_reads)
    keep = from_start[CHUNK - 1 :]
    kept = jnp.sum(jnp.sum(d_after * state, axis=1, keepdims=True), axis=0, keepdims=True) * keep
    last = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0) == CHUNK - 1
    through = dot(of_reads, state.astype(dtype), 1, 1)
    chain = Chain(
        solved=solved,
        q=through[CHUNK:],
        k=through[:CHUNK],
        ended=dot(corrected, after, 1, 1),
        kept=jnp.where(last, kept, 0.0),
    )
    return chain, keep * d_after + dot(jnp.concatenate([k, q]), of_reads, 0, 0)


class HeadGradients(NamedTuple):
    q: Float[Array, "2C k"]
    k: Float[Array, "2C k"]
    likeness_q: Float[Array, "C 2C"]
    likeness_k: Float[Array, "C 2C"]
    decay: Float[Array, "1 2C"]
    beta: Float[Array, "1 2C"]


def of_head(
    shared: Shared,
    chain: Chain,
    between: Float[Array, "C 2C"],
    to_end: Float[Array, "2C 1"],
    beta: Float[Array, "2C 1"],
    *,
    error: Float[Array, "2C v"],
    corrected: Float[Array, "2C v"],
    d_out: Float[Array, "2C v"],
) -> HeadGradients:
    """The gradients of one value head, without those of v. error: X. corrected: W."""
    d_scores = likeness(d_out, corrected)
    d_system = -likeness(chain.solved.astype(corrected.dtype), corrected)
    d_system = jnp.where(_rows() > _columns(), d_system, 0.0)
    of_q, of_k = d_scores * between, d_system * between
    of_beta = of_k * shared.likeness_k
    of_k *= wide(beta)
    d_between = of_q * shared.likeness_q + of_beta * wide(beta)  # times `between`

    ended = jnp.sum(chain.ended * shared.k, axis=1, keepdims=True) * to_end
    d_total = half_sums(d_between) - column(jnp.sum(d_between, axis=0, keepdims=True))
    d_total += jnp.sum(chain.q * shared.q + chain.k * shared.k, axis=1, keepdims=True)  # through f
    d_total += chain.kept - ended
    whole = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.sum(part, axis=0, keepdims=True), part.shape)
            for part in (ended[:CHUNK], ended[CHUNK:])
        ]
    )
    last = jax.lax.broadcasted_iota(jnp.int32, (PAIR, 1), 0) & (CHUNK - 1) == CHUNK - 1
    d_total += jnp.where(last, whole, 0.0)
    d_beta = jnp.sum(chain.solved * error, axis=1, keepdims=True) + half_sums(of_beta)
    return HeadGradients(
        q=chain.q,
        k=chain.k + to_end * chain.ended,
        likeness_q=of_q,
        likeness_k=of_k,
        decay=jnp.sum(jnp.where(shared.visible, wide(d_total), 0.0), axis=0, keepdims=True),
        beta=row(d_beta),
    )


def of_keys(shared: Shared, heads: list[HeadGradients]) -> tuple[jax.Array, jax.Array]:
    """The gradients of q and k: the sums over the value heads."""
    dtype = shared.q.dtype
    of_q, of_k = (
        spread(functools.reduce(jnp.add, [getattr(head, name) for head in heads])).astype(dtype)
        for name in ("likeness_q", "likeness_k")
    )
    d_q = functools.reduce(jnp.add, [head.q for head in heads]) + dot(of_q, shared.k)
    d_k = functools.reduce(jnp.add, [head.k for head in heads]) + dot(of_q, shared.q, 0, 0)
    return d_q, d_k + dot(of_k, shared.k) + dot(of_k, shared.k, 0, 0)


# ---------------------------------------------------------------- the triangular inverse
def system(
    likeness: Float[Array, "C 2C"], between: Float[Array, "C 2C"], beta: Float[Array, "2C 1"]
) -> Float[Array, "C 2C"]:
    """A. likeness: K K^T."""
    return jnp.where(_rows() > _columns(), wide(beta) * likeness * between, 0.0)


def inverse(system: Float[Array, "C 2C"], dtype: jax.typing.DTypeLike) -> Float[Array, "C 2C"]:
    """The inverses of I + system, for systems that are zero on and above the diagonal.

    Substitution in blocks of 8 rows; then, of two inverses X and Z of blocks, the inverse of
    [[X^-1, 0], [Y, Z^-1]] is [[X, 0], [-Z Y X, Z]]. As exact as substitution: a series of powers
    would not be, because the powers grow large before they vanish if keys are alike.

    dtype: of the inputs of the recurrence; see `exact_dot`.
    """
    rows, out = _rows(), _invert_blocks(system)
    size = BLOCK
    while size < CHUNK:
        # The block to the left of each second block on the diagonal.
        beside = (rows & size != 0) & (_columns() & -size == (rows & -size) - size)
        y = _second(jnp.where(beside, system, 0.0), size)
        yx = exact_dot(y, spread(out), dtype)
        yx = yx.reshape(-1, 1, size, PAIR)
        yx = jnp.concatenate([jnp.zeros_like(yx), yx], axis=1).reshape(CHUNK, PAIR)
        z = _second(out, size)
        z -= exact_dot(z, spread(yx), dtype)
        x = out.reshape(-1, 2, size, PAIR)[:, :1]
        out = jnp.concatenate([x, z.reshape(x.shape)], axis=1).reshape(CHUNK, PAIR)
        size *= 2
    return out


def _second(x: Float[Array, "C 2C"], size: int) -> Float[Array, "C/2 2C"]:
    """The rows of each second block of `size` rows."""
    return x.reshape(-1, 2, size, PAIR)[:, 1].reshape(-1, PAIR)


def _invert_blocks(system: Float[Array, "C 2C"]) -> Float[Array, "C 2C"]:
    """The inverses of the blocks of 8 on the diagonal, all in one register [8, 2C]: row i and lane
    8 b + j are entry (i, j) of block b.
    """
    on_diagonal = _rows() & -BLOCK == _columns() & -BLOCK
    blocks = jnp.sum(jnp.where(on_diagonal, system, 0.0).reshape(-1, BLOCK, PAIR), axis=0)
    rows, lanes = (jax.lax.broadcasted_iota(jnp.int32, blocks.shape, i) for i in (0, 1))
    out = jnp.where(lanes & (BLOCK - 1) == rows, 1.0, 0.0)
    for j in range(BLOCK - 1):
        factor = jnp.where(lanes & (BLOCK - 1) == j, blocks, 0.0)  # to all lanes of its block:
        for shift in (1, 2, 4):
            factor += pltpu.roll(factor, shift, 1)
        out -= pltpu.roll(factor, PAIR - j, 1) * out[j : j + 1]
    out = jnp.broadcast_to(out, (CHUNK // BLOCK, BLOCK, PAIR)).reshape(CHUNK, PAIR)
    return jnp.where(on_diagonal, out, 0.0)


# ---------------------------------------------------------------- products
def dot(a: jax.Array, b: jax.Array, over_a: int = 1, over_b: int = 0) -> jax.Array:
    """The product of two matrices over one axis of each, summed in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision="highest" if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def exact_dot(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> Float[Array, "x y"]:
    """The product of two float32 matrices: in float32, or for inputs in bfloat16 to 16 bits, in
    half as many products: of the upper and lower bits, without that of lower and lower.
    """
    if dtype == jnp.float32:
        return dot(a, b)
    (high, low), (b_high, b_low) = halves(a, dtype), halves(b, dtype)
    both = dot(jnp.concatenate([high, low]).astype(dtype), b_high.astype(dtype))
    return both[: len(a)] + both[len(a) :] + dot(high.astype(dtype), b_low.astype(dtype))


def halves(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The upper bits of float32 values, rounded to `dtype`, and what is left of them."""
    if dtype == jnp.float32:
        return x, jnp.zeros_like(x)
    # Rounded as integers: a TPU that computes in float32 only converts back in many operations.
    bits = (jax.lax.bitcast_convert_type(x, jnp.int32) + 0x8000) & ~0xFFFF
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def factors(inverse: Float[Array, "C 2C"], dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """The inverse of each chunk as `apply` takes it, [C, 2C]: its `halves` side by side."""
    high, low = halves(inverse, dtype)
    first = _lanes() < CHUNK
    sides = (high, pltpu.roll(low, CHUNK, 1)), (pltpu.roll(high, CHUNK, 1), low)
    return [jnp.where(first, *side).astype(dtype) for side in sides]


def apply(factor: Float[Array, "C 2C"], x: Float[Array, "C v"]) -> Float[Array, "C v"]:
    """The product of an inverse and x."""
    high, low = (half.astype(factor.dtype) for half in halves(x, factor.dtype))
    out = dot(factor, jnp.concatenate([high, high]))
    return out if factor.dtype == jnp.float32 else out + dot(factor[:, :CHUNK], low)


def apply_transposed(factor: Float[Array, "C 2C"], x: Float[Array, "C v"]) -> Float[Array, "C v"]:
    """The product of a transposed inverse and x."""
    high, low = (half.astype(factor.dtype) for half in halves(x, factor.dtype))
    out = dot(factor, high, 0, 0)
    out = out[:CHUNK] + out[CHUNK:]
    return out if factor.dtype == jnp.float32 else out + dot(factor[:, :CHUNK], low, 0, 0)


def likeness(a: Float[Array, "2C x"], b: Float[Array, "2C x"]) -> Float[Array, "C 2C"]:
    """The products of tokens with those of their chunk."""
    return packed(dot(a, b, 1, 1))


# ---------------------------------------------------------------- the parts of two chunks
def packed(x: Float[Array, "2C 2C"]) -> Float[Array, "C 2C"]:
    """Without the entries between two chunks."""
    return jnp.where(_lanes() < CHUNK, x[:CHUNK], x[CHUNK:])


def spread(x: Float[Array, "C 2C"]) -> Float[Array, "2C 2C"]:
    """The opposite of `packed`, with zeros between two chunks."""
    first = _lanes() < CHUNK
    return jnp.concatenate([jnp.where(first, x, 0.0), jnp.where(first, 0.0, x)])


def wide(x: Float[Array, "2C 1"]) -> Float[Array, "C 2C"]:
    """A value of each token along its row."""
    return jnp.where(_lanes() < CHUNK, x[:CHUNK], x[CHUNK:])


def half_sums(x: Float[Array, "C 2C"]) -> Float[Array, "2C 1"]:
    """The sums of the rows of each chunk."""
    return jnp.sum(spread(x), axis=1, keepdims=True)


def column(x: Float[Array, "1 2C"]) -> Float[Array, "2C 1"]:
    return half_sums(jnp.where(_rows() == _columns(), x, 0.0))


def row(x: Float[Array, "2C 1"]) -> Float[Array, "1 2C"]:
    return jnp.sum(jnp.where(_rows() == _columns(), wide(x), 0.0), axis=0, keepdims=True)


def _rows() -> Int[Array, "C 2C"]:
    return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, PAIR), 0)


def _lanes() -> Int[Array, "C 2C"]:
    return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, PAIR), 1)


def _columns() -> Int[Array, "C 2C"]:
    """The place of each lane in its chunk."""
    return _lanes() & (CHUNK - 1)
