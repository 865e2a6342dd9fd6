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
    trunks: with branches, the segment of the prompt that a token continues; its own for a token of
    a prompt. None without. A branch starts from the state after its prompt.
    """

    q: Float[Array, "B T M k"]
    k: Float[Array, "B T M k"]
    v: Float[Array, "B T M R v"]
    decay: Float[Array, "B T M R"]
    beta: Float[Array, "B T M R"]
    segments: Int[Array, "B T"]
    trunks: Int[Array, "B T"] | None = None


class DeltaCarry(NamedTuple):
    """The state after some tokens, float32, and the document of the last of them."""

    state: Float[Array, "B M R k v"]
    segment: Int[Array, " B"]


class _Chunks(NamedTuple):
    """Chunks [n, ...] of a row, for a scan over n.

    A chunk turns the state S into `keep` S + `keys`^T (`values` - `reads` S), and its outputs are
    `queries` S + `scores` (`values` - `reads` S): the WY form of the paper, with values = T V and
    reads = T K there. L states are read and written at once: of the last token; and with branches
    also that of the prompt that it continues. B and M are one axis, because XLA:CPU fails on arrays
    of many.
    """

    queries: Float[Array, "n L BM R C k"]
    scores: Float[Array, "n BM R C C"]
    keys: Float[Array, "n L BM R C k"]
    reads: Float[Array, "n L BM R C k"]
    values: Float[Array, "n BM R C v"]
    keep: Float[Array, "n L L BM R"]  # of the state written, from the state read


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
    out = out.reshape(-1, B, M, *out.shape[3:])  # [n, B, M, R, C, v]
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
    lanes = 1 if x.trunks is None else 2
    shape = carry.state.shape
    states = carry.state.reshape(-1, *shape[2:]), carry.segment
    start = DeltaCarry(*(jnp.broadcast_to(a, (lanes, *a.shape)) for a in states))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(carry: DeltaCarry, x: DeltaInputs) -> tuple[DeltaCarry, Any]:
        state, ys = jax.lax.scan(of_chunk, carry.state, _chunks(x, carry.segment))
        return DeltaCarry(state, jnp.stack([of[:, -1] for of in _numbers(x)])), ys

    carry, ys = jax.lax.scan(run, start, _grouped(x, min(GROUP, chunks) * CHUNK))
    return DeltaCarry(carry.state[0].reshape(shape), carry.segment[0]), ys


def _numbers(x: DeltaInputs) -> list[Int[Array, "B T"]]:
    """The segment that each state is of, after each token."""
    return [x.segments] if x.trunks is None else [x.segments, x.trunks]


def _grouped(x: DeltaInputs, size: int) -> DeltaInputs:
    """The tokens in groups of `size`, arrays [groups, B, size, ...]. Those that fill up the last
    one belong to the last document and leave the state as it is.
    """
    B, T = x.segments.shape

    def cut(a: jax.Array, mode: str = "constant") -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, -T % size), *((0, 0),) * (a.ndim - 2)), mode=mode)
        return jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0)

    filled = {"segments": cut(x.segments, "edge")}
    if x.trunks is not None:
        filled["trunks"] = cut(x.trunks, "edge")
    return dataclasses.replace(jax.tree.map(cut, x), **filled)


def _chunks(x: DeltaInputs, before: Int[Array, "L B"]) -> _Chunks:
    """The chunks of a whole number of them. before: the segments of the states before them."""
    B, T, M, R, _ = x.v.shape

    def by_chunk(a: jax.Array) -> jax.Array:  # [B, T, M, R or 1, x] -> [n, BM, R or 1, C, x]
        a = a.reshape(B, -1, CHUNK, *a.shape[2:]).transpose(1, 0, 3, 4, 2, 5)
        return a.reshape(len(a), B * M, *a.shape[3:])

    dtype = x.q.dtype
    q, k, v = (by_chunk(a) for a in (x.q[:, :, :, None], x.k[:, :, :, None], x.v))
    decay, beta = (by_chunk(a[..., None].astype(jnp.float32)) for a in (x.decay, x.beta))
    numbers = [  # [n, BM, 1, C]
        jnp.repeat(of.reshape(B, -1, CHUNK).swapaxes(0, 1), M, axis=1)[:, :, None]
        for of in _numbers(x)
    ]
    segments, trunks = numbers[0], numbers[-1]
    known = [  # the segment of each state before a chunk, [n, BM, 1, 1]
        jnp.concatenate([jnp.repeat(first, M)[None, :, None], of[:-1, ..., -1]])[..., None]
        for first, of in zip(before, numbers, strict=True)
    ]

    causal = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    sees = segments[..., None, :] == segments[..., None]
    visible = (sees | (segments[..., None, :] == trunks[..., None])) & causal
    # Not a cumulative sum: the decays of the documents before would round those of the last.
    total = _product(decay[..., 0], visible[:, :, 0], (-1, -1), jnp.float32)  # [n, BM, R, C]
    between = jnp.exp(jnp.where(visible, total[..., None] - total[..., None, :], -jnp.inf))

    continues = [segments == known[0]]  # a token reads the state of its segment or of its trunk
    if x.trunks is not None:
        continues.append((trunks == known[1]) & ~continues[0])
    from_start = jnp.stack([jnp.where(of, jnp.exp(total), 0.0) for of in continues], axis=1)
    to_end, keep = _to_end(visible, total, from_start, None)
    to_ends, keeps = [to_end], [keep]
    if x.trunks is not None:
        of_trunk = segments == trunks[..., -1:]  # the prompt that the last token continues
        place = jnp.where(of_trunk, jnp.arange(CHUNK), -1).max(-1, keepdims=True)
        to_end, keep = _to_end(visible, total, from_start, jnp.maximum(place, 0))
        is_there = place >= 0
        stays = (trunks[..., -1:] == known[1]) & jnp.asarray([False, True])[
            :, None, None, None, None
        ]
        to_ends.append(jnp.where(is_there, to_end, 0.0))
        keeps.append(jnp.where(is_there[:, None], keep, jnp.moveaxis(stays, 0, 1)))

    likeness = _product(k, k, (-1, -1), dtype)
    system = jnp.where(jnp.tril(causal, -1), beta * likeness * between, 0.0)
    reads = [beta * of[..., None] * k for of in jnp.moveaxis(from_start, 1, 0)]
    solved = jax.lax.linalg.triangular_solve(
        system,
        jnp.concatenate([*reads, beta * v], axis=-1),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    size = k.shape[-1]
    *reads, values = jnp.split(solved, [size * (i + 1) for i in range(len(reads))], axis=-1)
    return _Chunks(
        queries=(q[:, None] * from_start[..., None]).astype(dtype),
        scores=(_product(q, k, (-1, -1), dtype) * between).astype(dtype),
        keys=(k[:, None] * jnp.stack(to_ends, axis=1)[..., None]).astype(dtype),
        reads=jnp.stack(reads, axis=1).astype(dtype),
        values=values,
        keep=jnp.stack(keeps, axis=1)[..., 0],
    )


def _to_end(
    visible: jax.Array, total: jax.Array, from_start: jax.Array, place: jax.Array | None
) -> tuple[Float[Array, "n BM R C"], Float[Array, "n L BM R 1"]]:
    """How much of each token, and of each state before the chunk, is left after the token at
    `place` [n, BM, 1, 1]; None for the last token.
    """
    if place is None:
        row, end, kept = visible[..., -1, :], total[..., -1:], from_start[..., -1:]
    else:
        row = jnp.take_along_axis(visible, place[..., None], axis=-2)[..., 0, :]
        end = jnp.take_along_axis(total, place, axis=-1)
        kept = jnp.take_along_axis(from_start, place[:, None], axis=-1)
    return jnp.exp(jnp.where(row, end - total, -jnp.inf)), kept


def _advance(
    state: Float[Array, "L BM R k kv"], chunk: _Chunks
) -> tuple[Float[Array, "L BM R k kv"], None]:
    """The states after a chunk. Columns of a state before the last v have no values to take up."""
    return _after(state, chunk, _corrected(state, chunk)), None


def _with_outputs(
    state: Float[Array, "L BM R k v"], chunk: _Chunks
) -> tuple[Float[Array, "L BM R k v"], Float[Array, "BM R C v"]]:
    corrected, dtype = _corrected(state, chunk), chunk.keys.dtype
    out = _product(chunk.scores, corrected, (-1, -2), dtype)
    out += _read(chunk.queries, state)
    return _after(state, chunk, corrected), out


def _corrected(state: jax.Array, chunk: _Chunks) -> jax.Array:
    read = _read(chunk.reads, state)
    more = read.shape[-1] - chunk.values.shape[-1]
    return jnp.pad(chunk.values, ((0, 0),) * (read.ndim - 1) + ((more, 0),)) - read


def _after(state: jax.Array, chunk: _Chunks, corrected: jax.Array) -> jax.Array:
    dtype = chunk.keys.dtype
    added = jnp.stack([_product(keys, corrected, (-2, -2), dtype) for keys in chunk.keys])
    return jnp.sum(chunk.keep[..., None, None] * state, axis=1) + added


def _read(keys: Float[Array, "L BM R C k"], state: Float[Array, "L BM R k x"]) -> jax.Array:
    """What the tokens of a chunk read of all states."""
    pairs = zip(keys, state, strict=True)
    return functools.reduce(jnp.add, [_product(a, b, (-1, -2), keys.dtype) for a, b in pairs])


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any) -> jax.Array:
    """The products of matrices [..., x, y] over one axis of each, -1 or -2, in float32.

    The axes before are made one: XLA:CPU fails on a product of many.
    """
    matrices = [x.astype(dtype).reshape(-1, *x.shape[-2:]) for x in (a, b)]
    out = jax.lax.dot_general(
        matrices[0],
        matrices[1],
        (((over[0] + 3,), (over[1] + 3,)), ((0,), (0,))),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return out.reshape(*a.shape[:-2], *out.shape[1:])
