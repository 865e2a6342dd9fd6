"""The gated delta rule on a TPU: two Pallas (Mosaic) kernels that keep a state and all that a chunk
computes in vector memory.

The mathematics of lljax.models.mixers.delta_rule. A program computes the tokens of a group of
chunks for one key head and its R value heads; the groups of a row run in order and pass the state
on. The forward pass reads its inputs and writes its outputs once, and the state before each group,
which is all that the backward pass keeps: that one computes the states within a group again, and
walks the groups from the last to the first.
"""

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from lljax.models.mixers import delta_chunk
from lljax.models.mixers.delta_chunk import CHUNK, PAIR, TokenMasks
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs
from lljax.parallel.rounding import cdiv, round_up

LANES = 128
GROUP = 32  # pairs of chunks of a program, of all its value heads
VMEM = 64 * 2**20  # bytes that a kernel may take; a core of v5e, v5p and v6e has 128 MiB


def serves(x: DeltaInputs) -> bool:
    """Whether the kernels take these inputs: no branches, and sizes of whole registers."""
    return x.trunks is None and x.k.shape[-1] % LANES == x.v.shape[-1] % LANES == 0


def delta_rule(
    x: DeltaInputs, carry: DeltaCarry, *, interpret: bool = False
) -> tuple[Float[Array, "B T M R v"], DeltaCarry]:
    """The outputs of T tokens and the carry after them, as lljax.models.mixers.delta_rule computes
    them. The outputs are float32, rounded to the dtype of x.q.

    interpret: run the kernels as plain XLA, on any platform and for heads of any size; slow.
    """
    T, R = x.v.shape[1], x.v.shape[3]
    group = min(max(GROUP // R, 1), cdiv(T, PAIR))
    pairs = round_up(cdiv(T, PAIR), group)

    def pad(a: jax.Array, mode: str = "constant") -> jax.Array:
        after = pairs * PAIR - T
        return jnp.pad(a, ((0, 0), (0, after), *((0, 0),) * (a.ndim - 2)), mode=mode)

    def by_pair(a: jax.Array) -> jax.Array:  # [B, T, M, R] -> [B, M, n, R, 2C]
        a = pad(a.astype(jnp.float32))
        return a.reshape(len(a), pairs, PAIR, *a.shape[2:]).transpose(0, 3, 1, 4, 2)

    # The tokens of the padding belong to the last document and leave the state as it is.
    segments = pad(x.segments, "edge").reshape(-1, 2 * pairs, CHUNK)
    known = jnp.concatenate([carry.segment[:, None], segments[:, :-1, -1]], axis=1)
    known = jnp.broadcast_to(known[..., None], segments.shape)
    marks = jnp.stack([a.reshape(-1, pairs, PAIR) for a in (segments, known)], axis=2)
    operands = (
        pad(x.q).transpose(0, 2, 1, 3),
        pad(x.k).transpose(0, 2, 1, 3),
        pad(x.v).transpose(0, 2, 3, 1, 4),
        by_pair(x.decay),
        by_pair(x.beta),
        carry.state,
    )
    # custom_vjp has no type for its result
    out, state = cast(tuple[jax.Array, jax.Array], _recurrence(group, interpret, operands, marks))
    out = out.transpose(0, 3, 1, 2, 4)[:, :T].astype(jnp.float32)
    return out, DeltaCarry(state, x.segments[:, -1])


# q, k [B, M, T, k], v [B, M, R, T, v], decay and beta [B, M, n, R, 2C] and the state before the row
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
# The segment of each token, and of the state before its chunk
Marks = Int[Array, "B n 2 2C"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(group: int, interpret: bool, operands: Operands, marks: Marks):
    """The outputs, like v, and the state after the row."""
    out, state, _ = _forward(group, interpret, operands, marks, keeps=False)
    return out, state


def _recurrence_forward(group: int, interpret: bool, operands: Operands, marks: Marks):
    out, state, before = _forward(group, interpret, operands, marks, keeps=True)
    return (out, state), (operands[:5], marks, before)


def _recurrence_backward(group: int, interpret: bool, saved: Any, gradients: Any):
    return _backward(group, interpret, *saved, *gradients), None


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


# ---------------------------------------------------------------- the kernels
def _forward(group: int, interpret: bool, operands: Operands, marks: Marks, *, keeps: bool):
    """The outputs, the state after the row, and if `keeps` the states before each group,
    [B, M, groups, R, k, v], else None.
    """
    q, _, v, _, _, start = operands
    R, groups, dtype = v.shape[2], marks.shape[1] // group, q.dtype

    def kernel(q, k, v, decay, beta, start, marks, out, end, *rest):
        *before, state, factors, columns, scores = rest

        @pl.when(pl.program_id(2) == 0)
        def begin():
            state[...] = start[...]

        if keeps:
            before[0][...] = state[...]

        def prepare(p, _):
            tokens = _tokens(p, PAIR)
            likeness = delta_chunk.likeness(q[tokens, :], k[tokens, :])
            for r, between in enumerate(_prepare(p, k, decay, beta, marks, factors, columns)):
                scores[p, r] = delta_chunk.spread(likeness * between).astype(dtype)
            return 0

        def run(p, _):
            reads, added = [[] for _ in range(R)], [[] for _ in range(R)]
            for half, r in itertools.product((0, 1), range(R)):
                tokens = _tokens(2 * p + half, CHUNK)
                from_start, to_end, strength = _columns(columns, p, r, half)
                k_c, before_r = k[tokens, :], state[r]
                read_k, read_q = delta_chunk.read(q[tokens, :], k_c, before_r)
                error = v[r, tokens, :].astype(jnp.float32) - from_start * read_k
                corrected = delta_chunk.apply(factors[2 * p + half, r], strength * error)
                keep = from_start[CHUNK - 1 :]
                state[r] = delta_chunk.state_after(k_c, to_end, keep, corrected, before_r)
                reads[r].append(from_start * read_q)
                added[r].append(corrected.astype(dtype))
            for r in range(R):
                within = delta_chunk.dot(scores[p, r], jnp.concatenate(added[r]))
                y = jnp.concatenate(reads[r]) + within
                out[r, _tokens(p, PAIR), :] = y.astype(out.dtype)
            return 0

        jax.lax.fori_loop(0, group, prepare, 0)
        jax.lax.fori_loop(0, group, run, 0)

        @pl.when(pl.program_id(2) == groups - 1)
        def finish():
            end[...] = state[...]

    outputs = [(v.shape, v.dtype, "values"), (start.shape, start.dtype, "state")]
    if keeps:
        B, M = start.shape[:2]
        outputs.append(((B, M, groups, *start.shape[2:]), jnp.float32, "states"))
    kinds = ("keys", "keys", "values", "gates", "gates", "state", "marks")
    out, end, *before = _launch(
        "delta_rule_forward",
        kernel,
        group,
        interpret,
        inputs=list(zip((*operands, marks), kinds, strict=True)),
        outputs=outputs,
        scratch=[
            (start.shape[2:], jnp.float32),
            ((2 * group, R, CHUNK, PAIR), dtype),
            ((group, R, 3, PAIR, 1), jnp.float32),
            ((group, R, PAIR, PAIR), dtype),
        ],
        products=6,
    )
    return out, end, before[0] if keeps else None


def _backward(group: int, interpret: bool, operands, marks, before, d_out, d_end) -> Operands:
    """The gradients of the operands of `_forward`."""
    v, dtype = operands[2], operands[0].dtype
    R, groups = v.shape[2], marks.shape[1] // group

    def kernel(*refs):
        q, k, v, decay, beta, before, marks, d_out, d_end = refs[:9]
        dq, dk, dv, d_decay, d_beta, d_start = refs[9:15]
        states, d_state, factors, columns, betweens, errors, corrected = refs[15:]

        @pl.when(pl.program_id(2) == 0)  # the last group of the row
        def begin():
            d_state[...] = d_end[...]

        states[0] = before[...]

        def prepare(p, _):
            for r, between in enumerate(_prepare(p, k, decay, beta, marks, factors, columns)):
                betweens[p, r] = between
            return 0

        def run(p, _):
            for half, r in itertools.product((0, 1), range(R)):
                c = 2 * p + half
                tokens, there = _tokens(c, CHUNK), pl.ds(half * CHUNK, CHUNK)
                from_start, to_end, strength = _columns(columns, p, r, half)
                k_c, before_r = k[tokens, :], states[c, r]
                read = delta_chunk.dot(k_c, before_r.astype(dtype))
                error = v[r, tokens, :].astype(jnp.float32) - from_start * read
                added = delta_chunk.apply(factors[c, r], strength * error)
                keep = from_start[CHUNK - 1 :]
                states[c + 1, r] = delta_chunk.state_after(k_c, to_end, keep, added, before_r)
                errors[p, r, there, :] = error
                corrected[p, r, there, :] = added.astype(dtype)
            return 0

        def back(i, _):
            p = group - 1 - i
            tokens = _tokens(p, PAIR)
            shared = delta_chunk.Shared.of(q[tokens, :], k[tokens, :], TokenMasks.of(marks[p]))
            heads = []
            for r in range(R):
                d_y, between = d_out[r, tokens, :], betweens[p, r]
                scores = delta_chunk.spread(shared.likeness_q * between).astype(dtype)
                d_added = delta_chunk.dot(scores, d_y, 0, 0)
                parts = []
                for half in (1, 0):
                    c, rows = 2 * p + half, slice(half * CHUNK, (half + 1) * CHUNK)
                    part, d_state[r] = delta_chunk.back_through_state(
                        shared.q[rows],
                        shared.k[rows],
                        *_columns(columns, p, r, half),
                        factor=factors[c, r],
                        corrected=corrected[p, r, rows],
                        state=states[c, r],
                        d_out=d_y[rows],
                        d_corrected=d_added[rows],
                        d_after=d_state[r],
                    )
                    parts.insert(0, part)
                chain = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
                strength = columns[p, r, 2]
                head = delta_chunk.of_head(
                    shared,
                    chain,
                    between,
                    columns[p, r, 1],
                    strength,
                    error=errors[p, r],
                    corrected=corrected[p, r],
                    d_out=d_y,
                )
                heads.append(head)
                dv[r, tokens, :] = (strength * chain.solved).astype(dv.dtype)
                d_decay[p, r : r + 1, :] = head.decay
                d_beta[p, r : r + 1, :] = head.beta
            d_q, d_k = delta_chunk.of_keys(shared, heads)
            dq[tokens, :] = d_q.astype(dq.dtype)
            dk[tokens, :] = d_k.astype(dk.dtype)
            return 0

        for step in (prepare, run, back):
            jax.lax.fori_loop(0, group, step, 0)

        @pl.when(pl.program_id(2) == groups - 1)
        def finish():
            d_start[...] = d_state[...]

    kinds = ("keys", "keys", "values", "gates", "gates", "states", "marks", "values", "state")
    inputs = zip((*operands, before, marks, d_out, d_end), kinds, strict=True)
    outputs = zip(
        (*operands, d_end), ("keys", "keys", "values", "gates", "gates", "state"), strict=True
    )
    heads = d_end.shape[2:]
    return cast(
        Operands,
        _launch(
            "delta_rule_backward",
            kernel,
            group,
            interpret,
            inputs=list(inputs),
            outputs=[(a.shape, a.dtype, kind) for a, kind in outputs],
            scratch=[
                ((2 * group + 1, *heads), jnp.float32),
                (heads, jnp.float32),
                ((2 * group, R, CHUNK, PAIR), dtype),
                ((group, R, 3, PAIR, 1), jnp.float32),
                ((group, R, CHUNK, PAIR), jnp.float32),
                ((group, R, PAIR, v.shape[-1]), jnp.float32),
                ((group, R, PAIR, v.shape[-1]), dtype),
            ],
            products=20,
            backwards=True,
        ),
    )


def _prepare(p, k, decay, beta, marks, factors, columns) -> list[jax.Array]:
    """What two chunks need no state for: writes the inverses and the columns of each value head,
    and returns the decays between tokens.
    """
    masks, k_p = TokenMasks.of(marks[p]), k[_tokens(p, PAIR), :]
    likeness, betweens = delta_chunk.likeness(k_p, k_p), []
    for r in range(factors.shape[1]):
        gates = delta_chunk.gates(decay[p, r : r + 1, :], masks)
        strength = delta_chunk.column(beta[p, r : r + 1, :])
        system = delta_chunk.system(likeness, gates.between, strength)
        inverse = delta_chunk.inverse(system, factors.dtype)
        for half, factor in enumerate(delta_chunk.factors(inverse, factors.dtype)):
            factors[2 * p + half, r] = factor
        for i, values in enumerate((gates.from_start, gates.to_end, strength)):
            columns[p, r, i] = values
        betweens.append(gates.between)
    return betweens


def _columns(columns, p, r: int, half: int) -> list[jax.Array]:
    """from_start, to_end and beta of the tokens of a chunk, each [C, 1]."""
    return [columns[p, r, i, half * CHUNK : (half + 1) * CHUNK, :] for i in range(3)]


def _tokens(i: jax.Array, size: int):
    return pl.ds(pl.multiple_of(i * size, size), size)


def _launch(
    name: str,
    kernel: Any,
    group: int,
    interpret: bool,
    *,
    inputs: list[tuple[jax.Array, str]],
    outputs: list[tuple[tuple[int, ...], Any, str]],
    scratch: list[tuple[tuple[int, ...], Any]],
    products: int,
    backwards: bool = False,
) -> tuple[jax.Array, ...]:
    """Runs a kernel over (batch, key head, group of pairs); `backwards`, from the last group.

    inputs: (array, kind of block). outputs: (shape, dtype, kind). products: of a chunk and a value
      head, with the state or of that size.
    """
    (B, M, R, T, V), K = inputs[2][0].shape, inputs[0][0].shape[-1]
    size, groups = group * PAIR, T // (group * PAIR)

    def spec(shape: tuple[int | None, ...], *axes: str) -> pl.BlockSpec:
        def place(b, m, g):
            of = {"b": b, "m": m, "g": groups - 1 - g if backwards else g}
            return tuple(of.get(axis, 0) for axis in axes)

        return pl.BlockSpec(shape, place)

    specs = {
        "keys": spec((None, None, size, K), "b", "m", "g", ""),
        "values": spec((None, None, R, size, V), "b", "m", "", "g", ""),
        "gates": spec((None, None, group, R, PAIR), "b", "m", "g", "", ""),
        "marks": spec((None, group, 2, PAIR), "b", "g", "", ""),
        "state": spec((None, None, R, K, V), "b", "m", "", "", ""),
        "states": spec((None, None, None, R, K, V), "b", "m", "g", "", "", ""),
    }
    moved = [(a.size, a.dtype) for a, _ in inputs]
    moved += [(functools.reduce(int.__mul__, shape), dtype) for shape, dtype, _ in outputs]
    return pl.pallas_call(
        kernel,
        grid=(B, M, groups),
        in_specs=[specs[kind] for _, kind in inputs],
        out_specs=tuple(specs[kind] for *_, kind in outputs),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs),
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * B * M * R * T * K * V,
            transcendentals=B * M * R * T * CHUNK,
            bytes_accessed=sum(size * jnp.dtype(dtype).itemsize for size, dtype in moved),
        ),
        interpret=interpret,
        name=name,
    )(*(a for a, _ in inputs))
