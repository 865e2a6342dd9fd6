"""The gated delta rule, a linear recurrence over the tokens of a row, in chunks.

Yang et al. 2024, arXiv 2412.06464, eq. 10 (the rule) and section 3.3 (in chunks); transformers
`models/qwen3_next/modeling_qwen3_next.py` torch_chunk_gated_delta_rule. A head keeps a state
S [k, v], which every token decays, corrects and reads:

    S_t = exp(g_t) (1 - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T
    o_t = S_t^T q_t

Letters: B batch, T tokens, M key heads, R value heads of a key head, C tokens of a chunk, k and v
sizes of a key and of a value.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.parallel.rounding import cdiv

CHUNK = 64  # tokens that are computed together
# Chunks whose states the backward pass holds at a time; it keeps one state for so many.
GROUP = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaInputs:
    """What the tokens of a row bring to the recurrence. q is normalized and scaled, k normalized.

    decay: g, at most 0. segments: the document of each token; the state starts anew in each.
    """

    q: Float[Array, "B T M k"]
    k: Float[Array, "B T M k"]
    v: Float[Array, "B T M R v"]
    decay: Float[Array, "B T M R"]
    beta: Float[Array, "B T M R"]
    segments: Int[Array, "B T"]


class DeltaCarry(NamedTuple):
    """The state after some tokens, float32, and the document of the last of them."""

    state: Float[Array, "B M R k v"]
    segment: Int[Array, " B"]


class _Chunks(NamedTuple):
    """Chunks [n, B, M, R, ...] of a row, for a scan over n.

    A chunk turns the state S into `keep` S + `keys`^T (`values` - `reads` S), and its outputs are
    `queries` S + `scores` (`values` - `reads` S): the WY form of the paper, with values = T V and
    reads = T K there.
    """

    queries: Float[Array, "n B M R C k"]
    scores: Float[Array, "n B M R C C"]
    keys: Float[Array, "n B M R C k"]
    reads: Float[Array, "n B M R C k"]
    values: Float[Array, "n B M R C v"]
    keep: Float[Array, "n B M R 1 1"]


def step(x: DeltaInputs, carry: DeltaCarry) -> tuple[Float[Array, "B 1 M R v"], DeltaCarry]:
    """One token, T = 1: the outputs, float32, and the carry after it."""
    q, k, v, decay, beta = (a[:, 0].astype(jnp.float32) for a in (x.q, x.k, x.v, x.decay, x.beta))
    continues = (x.segments[:, 0] == carry.segment)[:, None, None]
    keep = jnp.where(continues, jnp.exp(decay), 0.0)
    state = carry.state * keep[..., None, None]
    error = v - jnp.einsum("bmrkv,bmk->bmrv", state, k, precision="highest")
    state += k[:, :, None, :, None] * (error * beta[..., None])[..., None, :]
    out = jnp.einsum("bmrkv,bmk->bmrv", state, q, precision="highest")
    return out[:, None], DeltaCarry(state, x.segments[:, 0])


def delta_rule(x: DeltaInputs, carry: DeltaCarry) -> tuple[Float[Array, "B T M R v"], DeltaCarry]:
    """The outputs of T tokens, float32, and the carry after them.

    Products take the dtype of x.q and accumulate in float32; the state is float32. The backward
    pass keeps a state for every GROUP chunks and computes the rest again.
    """
    B, T, M, R, size = x.v.shape
    carry, out = _scan_groups(x, carry, _with_outputs)
    out = out.reshape(-1, *out.shape[2:])  # [n, B, M, R, C, v]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, M, R, size)[:, :T], carry


def identity(x: DeltaInputs) -> Float[Array, "B M R k kv"]:
    """The transition of no tokens. A transition is a map [A | S] of states: state after = A (state
    before) + S.
    """
    size = x.k.shape[-1]
    B, _, M, R, v = x.v.shape
    return jnp.broadcast_to(jnp.eye(size, size + v), (B, M, R, size, size + v))


def extended(x: DeltaInputs, before: DeltaCarry) -> DeltaCarry:
    """The transition of tokens and then these. before.state: the transition of the tokens before
    them; before.segment: the document of the last of those.
    """
    return _scan_groups(x, before, _advance)[0]


def compose(
    first: Float[Array, "... k kv"], then: Float[Array, "... k kv"]
) -> Float[Array, "... k kv"]:
    """The transition of two stretches of tokens, one after the other."""
    size = first.shape[-2]
    after = jnp.matmul(then[..., :size], first, precision="highest")
    return after.at[..., size:].add(then[..., size:])


def _scan_groups(x: DeltaInputs, carry: DeltaCarry, of_chunk: Any) -> tuple[DeltaCarry, Any]:
    """Runs of_chunk(state, chunk) -> (state, y) over all chunks. ys: [groups, chunks, ...]."""
    chunks = cdiv(x.q.shape[1], CHUNK)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(carry: DeltaCarry, x: DeltaInputs) -> tuple[DeltaCarry, Any]:
        state, ys = jax.lax.scan(of_chunk, carry.state, _chunks(x, carry.segment))
        return DeltaCarry(state, x.segments[:, -1]), ys

    return jax.lax.scan(run, carry, _grouped(x, min(GROUP, chunks) * CHUNK))


def _grouped(x: DeltaInputs, size: int) -> DeltaInputs:
    """The tokens in groups of `size`, arrays [groups, B, size, ...]. Those that fill up the last
    one belong to the last document and leave the state as it is.
    """
    B, T = x.segments.shape

    def cut(a: jax.Array, mode: str = "constant") -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, -T % size), *((0, 0),) * (a.ndim - 2)), mode=mode)
        return jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0)

    return dataclasses.replace(jax.tree.map(cut, x), segments=cut(x.segments, "edge"))


def _chunks(x: DeltaInputs, segment: Int[Array, " B"]) -> _Chunks:
    """The chunks of a whole number of them. segment: the document of the token before."""
    B, T, M, R, _ = x.v.shape

    def by_chunk(a: jax.Array) -> jax.Array:  # [B, T, M, R or 1, x] -> [n, B, M, R or 1, C, x]
        return a.reshape(B, -1, CHUNK, *a.shape[2:]).transpose(1, 0, 3, 4, 2, 5)

    dtype = x.q.dtype
    q, k, v = (by_chunk(a) for a in (x.q[:, :, :, None], x.k[:, :, :, None], x.v))
    decay, beta = (by_chunk(a[..., None].astype(jnp.float32)) for a in (x.decay, x.beta))
    segments = x.segments.reshape(B, -1, CHUNK).transpose(1, 0, 2)[:, :, None, None]
    before = jnp.concatenate([segment[None, :, None, None], segments[:-1, ..., -1]])[..., None]

    causal = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    visible = (segments[..., None] == segments[..., None, :]) & causal
    # Not a cumulative sum: the decays of the documents before would round those of the last.
    total = _product("...ij,...jx->...ix", visible, decay, jnp.float32)[..., 0]  # [n, B, M, R, C]
    between = jnp.exp(jnp.where(visible, total[..., None] - total[..., None, :], -jnp.inf))
    from_start = jnp.where(segments == before, jnp.exp(total), 0.0)[..., None]
    reaches_end = segments == segments[..., -1:]
    to_end = jnp.exp(jnp.where(reaches_end, total[..., -1:] - total, -jnp.inf))[..., None]

    likeness = _product("...ik,...jk->...ij", k, k, dtype)
    system = jnp.where(jnp.tril(causal, -1), beta * likeness * between, 0.0)
    wanted = jnp.concatenate([beta * from_start * k, beta * v], axis=-1)
    solved = jax.lax.linalg.triangular_solve(
        system, wanted, left_side=True, lower=True, unit_diagonal=True
    )
    size = k.shape[-1]
    return _Chunks(
        queries=(q * from_start).astype(dtype),
        scores=(_product("...ik,...jk->...ij", q, k, dtype) * between).astype(dtype),
        keys=(k * to_end).astype(dtype),
        reads=solved[..., :size].astype(dtype),
        values=solved[..., size:],
        keep=from_start[..., -1:, :],
    )


def _advance(
    state: Float[Array, "B M R k kv"], chunk: _Chunks
) -> tuple[Float[Array, "B M R k kv"], None]:
    """The state after a chunk. Columns of the state before the last v have no values to take up."""
    return _after(state, chunk, _corrected(state, chunk)), None


def _with_outputs(
    state: Float[Array, "B M R k v"], chunk: _Chunks
) -> tuple[Float[Array, "B M R k v"], Float[Array, "B M R C v"]]:
    corrected, dtype = _corrected(state, chunk), chunk.keys.dtype
    out = _product("...ck,...kv->...cv", chunk.queries, state, dtype)
    out += _product("...ij,...jv->...iv", chunk.scores, corrected, dtype)
    return _after(state, chunk, corrected), out


def _corrected(state: jax.Array, chunk: _Chunks) -> jax.Array:
    read = _product("...ck,...kv->...cv", chunk.reads, state, chunk.keys.dtype)
    more = read.shape[-1] - chunk.values.shape[-1]
    return jnp.pad(chunk.values, ((0, 0),) * (read.ndim - 1) + ((more, 0),)) - read


def _after(state: jax.Array, chunk: _Chunks, corrected: jax.Array) -> jax.Array:
    added = _product("...ck,...cv->...kv", chunk.keys, corrected, chunk.keys.dtype)
    return chunk.keep * state + added


def _product(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(
        subscripts,
        a.astype(dtype),
        b.astype(dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
