"""The gated delta rule on a TPU: two Pallas (Mosaic) kernels that keep a state and all that a chunk
computes in vector memory.

The mathematics of lljax.models.mixers.delta_rule. A program computes the tokens of a group of
chunks for one key head and its R value heads; the groups of a row run in order and pass the state
on. The forward pass reads its inputs and writes its outputs once, and the state before each group,
which is all that the backward pass keeps: that one computes the states within a group again, and
walks the groups from the last to the first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from lljax.models.mixers import delta_chunk
from lljax.models.mixers.delta_chunk import CHUNK, TokenMasks
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs
from lljax.parallel.rounding import cdiv, round_up

LANES = 128
GROUP = 16  # chunks of a program
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
    T = x.q.shape[1]
    chunks = cdiv(T, CHUNK)
    group = min(GROUP, chunks)
    chunks = round_up(chunks, group)

    def pad(a: jax.Array, mode: str = "constant") -> jax.Array:
        after = chunks * CHUNK - T
        return jnp.pad(a, ((0, 0), (0, after), *((0, 0),) * (a.ndim - 2)), mode=mode)

    def by_chunk(a: jax.Array) -> jax.Array:  # [B, T, M, R] -> [B, M, n, R, C]
        a = pad(a.astype(jnp.float32))
        return a.reshape(len(a), chunks, CHUNK, *a.shape[2:]).transpose(0, 3, 1, 4, 2)

    # The tokens of the padding belong to the last document and leave the state as it is.
    segments = pad(x.segments, "edge").reshape(-1, chunks, CHUNK)
    known = jnp.concatenate([carry.segment[:, None], segments[:, :-1, -1]], axis=1)
    operands = (
        pad(x.q).transpose(0, 2, 1, 3),
        pad(x.k).transpose(0, 2, 1, 3),
        pad(x.v).transpose(0, 2, 3, 1, 4),
        by_chunk(x.decay),
        by_chunk(x.beta),
        carry.state,
    )
    marks = jnp.stack([segments, jnp.broadcast_to(known[..., None], segments.shape)], axis=2)
    out, state = _recurrence(group, interpret, operands, marks)
    out = out.transpose(0, 3, 1, 2, 4)[:, :T].astype(jnp.float32)
    return out, DeltaCarry(state, x.segments[:, -1])


# q, k [B, M, T, k], v [B, M, R, T, v], decay and beta [B, M, n, R, C] and the state before the row
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
# The segment of each token, and of the state before its chunk
Marks = Int[Array, "B n 2 C"]


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
    R, groups = v.shape[2], marks.shape[1] // group

    def kernel(q, k, v, decay, beta, start, marks, out, end, *rest):
        *before, state, inverses = rest

        @pl.when(pl.program_id(2) == 0)
        def begin():
            state[...] = start[...]

        if keeps:
            before[0][...] = state[...]
        _invert(group, k, decay, beta, marks, inverses)

        def run(c, _):
            tokens = _tokens(c)
            masks = TokenMasks.of(marks[c])
            q_c, k_c = q[tokens, :], k[tokens, :]
            likeness = delta_chunk.dot(q_c, k_c, 1, 1)
            for r in range(R):
                gates = delta_chunk.gates(decay[c, r : r + 1, :], beta[c, r : r + 1, :], masks)
                before_r = state[r]
                y, corrected = delta_chunk.outputs(
                    *(q_c, k_c, v[r, tokens, :], likeness), gates, inverses[c, r], before_r
                )
                out[r, tokens, :] = y.astype(out.dtype)
                state[r] = delta_chunk.state_after(k_c, gates, corrected, before_r)
            return 0

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
        scratch=[(start.shape[2:], jnp.float32), ((group, R, CHUNK, CHUNK), jnp.float32)],
        products=6,
    )
    return out, end, before[0] if keeps else None


def _backward(group: int, interpret: bool, operands, marks, before, d_out, d_end) -> Operands:
    """The gradients of the operands of `_forward`."""
    q, k, v, decay, _ = operands
    R, groups = v.shape[2], marks.shape[1] // group

    def kernel(*refs):
        q, k, v, decay, beta, before, marks, d_out, d_end = refs[:9]
        dq, dk, dv, d_decay, d_beta, d_start = refs[9:15]
        states, d_state, inverses, corrected = refs[15:]

        @pl.when(pl.program_id(2) == 0)  # the last group of the row
        def begin():
            d_state[...] = d_end[...]

        _invert(group, k, decay, beta, marks, inverses)
        states[0] = before[...]

        def forward(c, _):
            tokens = _tokens(c)
            masks = TokenMasks.of(marks[c])
            k_c = k[tokens, :]
            for r in range(R):
                gates = delta_chunk.gates(decay[c, r : r + 1, :], beta[c, r : r + 1, :], masks)
                before_r = states[c, r]
                error = delta_chunk.error(k_c, v[r, tokens, :], gates, before_r)
                corrected_r = delta_chunk.corrected(inverses[c, r], gates, error)
                corrected[c, r] = corrected_r.astype(corrected.dtype)

                @pl.when(c < group - 1)
                def go_on(r=r, gates=gates, corrected_r=corrected_r, before_r=before_r):
                    after = delta_chunk.state_after(k_c, gates, corrected_r, before_r)
                    states[c + 1, r] = after

            return 0

        jax.lax.fori_loop(0, group, forward, 0)

        def back(i, _):
            c = group - 1 - i
            tokens = _tokens(c)
            masks = TokenMasks.of(marks[c])
            shared = delta_chunk.Shared.of(q[tokens, :], k[tokens, :])
            for r in range(R):
                gates = delta_chunk.gates(decay[c, r : r + 1, :], beta[c, r : r + 1, :], masks)
                of_head = delta_chunk.backward(
                    shared,
                    gates,
                    v=v[r, tokens, :],
                    inverse=inverses[c, r],
                    corrected=corrected[c, r],
                    state=states[c, r],
                    d_out=d_out[r, tokens, :],
                    d_after=d_state[r],
                )
                dv[r, tokens, :] = of_head.v.astype(dv.dtype)
                d_decay[c, r : r + 1, :] = of_head.decay
                d_beta[c, r : r + 1, :] = of_head.beta
                d_state[r] = of_head.state
                shared = shared.plus(of_head)
            d_q, d_k = shared.gradients()
            dq[tokens, :] = d_q.astype(dq.dtype)
            dk[tokens, :] = d_k.astype(dk.dtype)
            return 0

        jax.lax.fori_loop(0, group, back, 0)

        @pl.when(pl.program_id(2) == groups - 1)
        def finish():
            d_start[...] = d_state[...]

    kinds = ("keys", "keys", "values", "gates", "gates", "states", "marks", "values", "state")
    inputs = zip((*operands, before, marks, d_out, d_end), kinds, strict=True)
    outputs = zip(
        (*operands, d_end), ("keys", "keys", "values", "gates", "gates", "state"), strict=True
    )
    return tuple(
        _launch(
            "delta_rule_backward",
            kernel,
            group,
            interpret,
            inputs=list(inputs),
            outputs=[(a.shape, a.dtype, kind) for a, kind in outputs],
            scratch=[
                ((group, *d_end.shape[2:]), jnp.float32),
                (d_end.shape[2:], jnp.float32),
                ((group, R, CHUNK, CHUNK), jnp.float32),
                ((group, R, CHUNK, v.shape[-1]), q.dtype),
            ],
            products=20,
            backwards=True,
        )
    )


def _invert(group: int, k, decay, beta, marks, inverses) -> None:
    """Writes the inverses of the chunks of a group. They need no state, so nothing waits for them
    and they wait for nothing.
    """

    def run(c, _):
        masks = TokenMasks.of(marks[c])
        k_c = k[_tokens(c), :]
        likeness = delta_chunk.dot(k_c, k_c, 1, 1)
        for r in range(inverses.shape[1]):
            gates = delta_chunk.gates(decay[c, r : r + 1, :], beta[c, r : r + 1, :], masks)
            inverses[c, r] = delta_chunk.inverse(delta_chunk.system(likeness, gates))
        return 0

    jax.lax.fori_loop(0, group, run, 0)


def _tokens(c: jax.Array):
    return pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)


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
) -> list[jax.Array]:
    """Runs a kernel over (batch, key head, group of chunks); `backwards`, from the last group.

    inputs: (array, kind of block). outputs: (shape, dtype, kind). products: of a chunk and a value
      head, with the state or of that size.
    """
    (B, M, T, K), (R, V) = inputs[0][0].shape, (inputs[2][0].shape[i] for i in (2, 4))
    size, groups = group * CHUNK, T // (group * CHUNK)

    def spec(shape: tuple[int | None, ...], *axes: str) -> pl.BlockSpec:
        def place(b, m, g):
            of = {"b": b, "m": m, "g": groups - 1 - g if backwards else g}
            return tuple(of.get(axis, 0) for axis in axes)

        return pl.BlockSpec(shape, place)

    specs = {
        "keys": spec((None, None, size, K), "b", "m", "g", ""),
        "values": spec((None, None, R, size, V), "b", "m", "", "g", ""),
        "gates": spec((None, None, group, R, CHUNK), "b", "m", "g", "", ""),
        "marks": spec((None, group, 2, CHUNK), "b", "g", "", ""),
        "state": spec((None, None, R, K, V), "b", "m", "", "", ""),
        "states": spec((None, None, None, R, K, V), "b", "m", "g", "", "", ""),
    }
    moved = [(a.size, a.dtype) for a, _ in inputs]
    moved += [(functools.reduce(int.__mul__, shape), dtype) for shape, dtype, _ in outputs]
    return pl.pallas_call(
        kernel,
        grid=(B, M, groups),
        in_specs=[specs[kind] for _, kind in inputs],
        out_specs=[specs[kind] for *_, kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
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
