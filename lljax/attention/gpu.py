"""Flash attention for NVIDIA GPUs: Pallas kernels through Triton, for every mask.

They follow Dao 2023, arXiv 2307.08691, algorithms 1 and 2, as `lljax.attention.blockwise` does. A
block of queries loops over blocks of keys only where the mask leaves something. Nothing dense is
kept: XLA reduces the mask to the extremes of each block (`lljax.attention.blocks`), and to six
numbers that bound the loops of a block (`Call.spans_of_queries`, `Call.spans_of_keys`). The kernels
are in `lljax.attention.gpu_kernels`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from lljax.attention.blocks import (
    Extremes,
    Rows,
    after_trunk,
    all_visible,
    anchors_first,
    any_visible,
    compared,
    extremes,
    in_row_order,
    span,
)
from lljax.attention.gpu_kernels import Scores, dkv_kernel, dq_kernel, forward_kernel
from lljax.attention.mask import Mask, pad
from lljax.parallel.rounding import cdiv, round_up

PAIRS_AT_ONCE = 2**22  # pairs of blocks that are compared at once: a few bytes each


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of q over k and v: the output, like q, and the log-sum-exp of each query's scores,
    float32. A query that sees nothing gets zeros, and FLOOR.

    interpret: run the kernels as plain XLA, on any platform; slow.
    """
    call = Call(q, k, v, mask, blocks=forward_blocks(q.shape[3], q.dtype), interpret=interpret)
    q = call.queries(q)
    lse = jax.ShapeDtypeStruct((call.B, call.N, q.shape[1]), jnp.float32)
    kernel = functools.partial(forward_kernel, scores=call.scores(scale, softcap))
    out, lse = call.over_queries(kernel, {"BTNH": (q,)}, [("BTNH", q), ("BNT", lse)])
    return call.queries_back(out), jnp.moveaxis(lse, 1, 2)[:, : call.T]


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
    interpret: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` for q, k and v, given its results (output and log-sum-exp) and the
    gradient of its output.

    The results may be of attention over more keys than `k`: gradients over parts of the keys then
    add up to the whole.
    dtype: the dtype of the gradients, rounded once, after float32 sums; float32 if parts are still
      to be summed.
    """
    call = Call(q, k, v, mask, blocks=backward_blocks(q.shape[3], q.dtype), interpret=interpret)
    out, lse = results
    # float32: delta is subtracted from products of the same size
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q, d_out = call.queries(q), call.queries(d_out.astype(q.dtype))
    operands = {"BTNH": (q, d_out), "BNT": (call.statistics(lse), call.statistics(delta))}
    scores = call.scores(scale, softcap)
    (dq,) = call.over_queries(
        functools.partial(dq_kernel, scores=scores),
        operands,
        [("BTNH", jax.ShapeDtypeStruct(q.shape, dtype))],
    )
    dk, dv = call.over_keys(
        functools.partial(dkv_kernel, scores=scores),
        operands,
        [("BSKH", jax.ShapeDtypeStruct(call.k.shape, dtype))] * 2,
    )
    return call.queries_back(dq), call.keys_back(dk), call.keys_back(dv)


def forward_blocks(H: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """Queries and keys of a block, such that two stages of keys and values fit the 99 KB of an A10
    or L4.
    """
    if H > 256:
        return 32, 16
    return (128, 64) if H <= 128 and jnp.dtype(dtype).itemsize == 2 else (64, 32)


def backward_blocks(H: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """The same for the backward pass, which holds twice as many operands."""
    if H > 256:
        return 16, 16
    return (64, 64) if H <= 128 and jnp.dtype(dtype).itemsize == 2 else (32, 32)


Named = tuple[str, jax.Array | jax.ShapeDtypeStruct]  # the letters of its axes, and the array


class Call:
    """Operands padded to whole blocks, the mask reduced to integers of tokens and blocks, and the
    two ways to launch a kernel.

    Arrays are named by the letters of their axes, which are the package's; I and J, blocks of
      queries and of keys; P and C, the integers of queries and of keys that the mask compares; and
      2 and 6, of `_stacked` and `_spans`.
    """

    def __init__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        *,
        blocks: tuple[int, int],
        interpret: bool,
    ):
        self.B, self.T, self.N, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.bq, self.bk = blocks
        self.interpret, self.places = interpret, None
        self.T_pad, self.S_pad = round_up(self.T, self.bq), round_up(self.S, self.bk)
        self.H_pad = max(16, pl.next_power_of_2(self.H))
        self.front = None  # how many blocks hold an anchor: after `anchors_first` the first ones
        if mask.window is not None and mask.anchors is not None:
            self.front = cdiv(jnp.sum(mask.anchors, axis=1), self.bk)
            k, v, mask, self.places = anchors_first(k, v, mask)
        self.k, self.v = (_pad(x, {1: self.S_pad, 3: self.H_pad}) for x in (k, v))
        self.q_rows, self.k_rows = compared(pad(mask, self.T_pad, self.S_pad))
        self.q_extremes = extremes(self.q_rows, self.bq)
        self.k_extremes = extremes(self.k_rows, self.bk)

    def scores(self, scale: float, softcap: float | None) -> Scores:
        return Scores(scale, softcap, q_names=tuple(self.q_rows), k_names=tuple(self.k_rows))

    def queries(self, x: jax.Array) -> jax.Array:  # [B, T, N, H] as the kernels read it
        return _pad(x, {1: self.T_pad, 3: self.H_pad})

    def queries_back(self, x: jax.Array) -> jax.Array:  # the inverse
        return x[:, : self.T, :, : self.H]

    def statistics(self, x: jax.Array) -> jax.Array:  # [B, T, N] -> [B, N, T]
        return _pad(jnp.moveaxis(x, 1, 2), {2: self.T_pad})

    def keys_back(self, x: jax.Array) -> jax.Array:  # [B, S, K, H] as the caller ordered it
        return in_row_order(x[:, : self.S, :, : self.H], self.places)

    def over_queries(
        self, kernel: Callable, operands: dict[str, tuple], results: list[Named]
    ) -> list[jax.Array]:
        """Runs `kernel` for each block of queries of each head."""
        blocks, R = self.T_pad // self.bq, self.N // self.K

        def last_first(n, i, b):  # causality makes the loops of the last blocks the longest
            return blocks - 1 - i

        cut = {
            "B": (None, lambda n, i, b: b),
            "N": (None, lambda n, i, b: n),
            "T": (self.bq, last_first),
            "I": (None, last_first),
            "K": (None, lambda n, i, b: jax.lax.div(n, R)),
        }
        kernel = functools.partial(kernel, bk=self.bk)
        inputs = self._inputs(operands, ("B6I", self.spans_of_queries()))
        return self._launch(kernel, (self.N, blocks, self.B), cut, inputs, results)

    def over_keys(
        self, kernel: Callable, operands: dict[str, tuple], results: list[Named]
    ) -> list[jax.Array]:
        """Runs `kernel` for each block of keys of each key/value head."""
        blocks, R = self.S_pad // self.bk, self.N // self.K
        cut = {
            "B": (None, lambda n, j, b: b),
            "N": (R, lambda n, j, b: n),
            "K": (None, lambda n, j, b: n),
            "S": (self.bk, lambda n, j, b: j),
            "J": (None, lambda n, j, b: j),
        }
        kernel = functools.partial(kernel, bq=self.bq)
        inputs = self._inputs(operands, ("B6J", self.spans_of_keys()))
        return self._launch(kernel, (self.K, blocks, self.B), cut, inputs, results)

    def spans_of_queries(self) -> Int[Array, "B 6 I"]:
        blocks = self.S_pad // self.bk
        first = None if self.front is None else jnp.arange(blocks) < self.front[:, None]

        def kinds(q):
            visited, aside = any_visible(q, self.k_extremes), first
            if "trunk_low" in q:
                others = visited if first is None else visited & ~first
                aside = after_trunk(q, self.k_extremes, others)
            return visited, all_visible(q, self.k_extremes), aside

        return _spans(kinds, self.q_extremes, blocks)

    def spans_of_keys(self) -> Int[Array, "B 6 J"]:
        def kinds(k):
            return any_visible(self.q_extremes, k), all_visible(self.q_extremes, k), None

        return _spans(kinds, self.k_extremes, self.T_pad // self.bq)

    def _inputs(self, operands: dict[str, tuple], spans: Named) -> list[Named]:
        """All arrays that a kernel reads, in its order."""
        return [
            *((letters, x) for letters, xs in operands.items() for x in xs),
            ("BSKH", self.k),
            ("BSKH", self.v),
            ("BPT", jnp.stack([x.astype(jnp.int32) for x in self.q_rows.values()], axis=1)),
            ("BCS", jnp.stack([x.astype(jnp.int32) for x in self.k_rows.values()], axis=1)),
            ("B2PI", _stacked(self.q_extremes, self.q_rows)),
            ("B2CJ", _stacked(self.k_extremes, self.k_rows)),
            spans,
        ]

    def _launch(
        self,
        kernel: Callable,
        grid: tuple[int, ...],
        cut: dict[str, tuple],
        inputs: list[Named],
        results: list[Named],
    ) -> list[jax.Array]:
        """cut: of some letters, the size of the piece that a program gets (None: an element), and
        the function from the program to the number of the piece.
        """

        def spec(letters: str, x: jax.Array | jax.ShapeDtypeStruct):
            pieces = [
                cut.get(letter, (length, lambda *_: 0))
                for letter, length in zip(letters, x.shape, strict=True)
            ]
            return pl.BlockSpec(
                tuple(size for size, _ in pieces),
                lambda *program: tuple(place(*program) for _, place in pieces),
            )

        return pl.pallas_call(
            kernel,
            grid=grid,
            interpret=self.interpret,
            in_specs=[spec(*named) for named in inputs],
            out_specs=[spec(*named) for named in results],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in results],
            compiler_params=plgpu.CompilerParams(
                num_warps=8 if self.H_pad >= 128 else 4, num_stages=2
            ),
        )(*(x for _, x in inputs))


def _pad(x: jax.Array, lengths: dict[int, int]) -> jax.Array:
    """x padded with zeros to the lengths of some axes."""
    return jnp.pad(
        x, [(0, lengths.get(axis, length) - length) for axis, length in enumerate(x.shape)]
    )


def _stacked(blocks: Extremes, rows: Rows) -> Int[Array, "B 2 C blocks"]:
    """The smallest and the largest of each of `rows` in each block."""
    return jnp.stack(
        [jnp.stack([blocks[name + end] for name in rows], axis=1) for end in ("_low", "_high")],
        axis=1,
    ).astype(jnp.int32)


def _spans(
    kinds: Callable[[Extremes], tuple[jax.Array, jax.Array, jax.Array | None]],
    here: Extremes,
    others: int,
) -> Int[Array, "B 6 blocks"]:
    """Bounds of the loop of each block `here` over the `others` blocks of the other kind.

    kinds(extremes [B, 1] of a block) -> (`any_visible`, `all_visible`, aside) against the others,
      bool [B, others]. Called for few blocks at a time: no table of all pairs is kept. aside: the
      first blocks, which hold anchors; or with branches the last ones, see `after_trunk`; or None.

    Returns: a0, a1, start, f0, f1, stop. The visited blocks lie in [a0, a1), which are aside, and
      in [start, stop), which are not. The unmasked blocks of the latter lie in [f0, f1), which is
      empty unless they lie side by side.
    """
    B = here["last"].shape[0]

    def bounds(block):
        visited, unmasked, aside = kinds(block)
        a0 = a1 = jnp.zeros(B, jnp.int32)
        if aside is not None:
            a0, a1 = span(visited & aside)
            visited, unmasked = visited & ~aside, unmasked & ~aside
        (start, stop), (f0, f1) = span(visited), span(unmasked)
        side_by_side = (f0 < f1) & (unmasked.sum(-1) == f1 - f0)
        f0, f1 = (jnp.where(side_by_side, f, start) for f in (f0, f1))
        return jnp.stack([a0, a1, start, f0, f1, stop], axis=1)

    blocks = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0)[..., None], here)
    at_once = max(1, PAIRS_AT_ONCE // (B * others))
    return jnp.moveaxis(jax.lax.map(bounds, blocks, batch_size=at_once), 0, 2)
