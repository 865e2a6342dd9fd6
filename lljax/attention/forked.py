"""Attention of rows that continue one prompt, in decoding: the keys and values of the prompt (the
trunk) exist once and are read once for all rows. Juravsky et al. 2024, Hydragen, arXiv 2402.05099,
section 3.

Attention over the trunk and over a row's own tokens are two softmaxes, merged by their log-sum-exp.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lljax.attention.mask import Mask, of_keys, visible
from lljax.attention.options import AttentionOptions
from lljax.attention.shard import CUT, CUT_HEADS, HEADS, PER_HEAD, platform_options
from lljax.attention.softcap import apply_softcap
from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import ROWS, Layout

SCORE_BYTES = 2**22  # scores of a block of the trunk, on one device
# ... if keys and values are read as they are kept: a single block is not even cut out. A CPU copies
# them in any case.
SCORE_BYTES_IN_PLACE = {"cpu": SCORE_BYTES, "gpu": 2**28, "tpu": 2**28}
MASKED = -1e30
TRUNK = PartitionSpec(ROWS, HEADS)  # how arrays [rows, K, S, ...] of the trunk lie on the mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trunk:
    """The keys and values of a prompt that the rows of a batch continue.

    kept: arrays [rows, K, S, ...] in a form that `read` understands. One row; over a mesh, equal
      rows, one for each device that shares the rows of the batch.
    used: how many slots are taken, [rows]. All of these tokens are before every query.
    mask: which of the S slots each query sees.
    read: read(kept, start, size) -> keys and values [rows, K, size, H] of the slots from `start`.
    in_place: whether `read` returns slices of `kept`, and computes nothing.
    """

    kept: Any
    used: Int[Array, " rows"]
    mask: Mask
    read: Callable[..., tuple[jax.Array, jax.Array]] = dataclasses.field(metadata={"static": True})
    in_place: bool = dataclasses.field(metadata={"static": True})


def attend_forked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    trunk: Trunk,
    options: AttentionOptions,
    *,
    layout: Layout | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of q over the trunk and over k and v, the own tokens of each row, under `mask`."""
    options = platform_options(options, layout)
    if layout is None:
        return _attend(q, k, v, mask, trunk, options)
    cut: Any = dataclasses.replace(trunk, kept=TRUNK, used=PartitionSpec(ROWS), mask=CUT)
    return jax.shard_map(
        _attend,
        mesh=layout.mesh,
        in_specs=(CUT_HEADS, CUT_HEADS, CUT_HEADS, CUT, cut, PER_HEAD),
        out_specs=CUT_HEADS,
        check_vma=False,
    )(q, k, v, mask, trunk, options)


class _Sums(NamedTuple):
    """Softmax over some of the keys. top: the largest score; total: the sum of the weights
    exp(score - top); out: the values, summed by weight. float32, as in every implementation.
    """

    top: Float[Array, "B K G T"]
    total: Float[Array, "B K G T"]
    out: Float[Array, "B K G T H"]

    def merge(self, other: "_Sums") -> "_Sums":
        top = jnp.maximum(self.top, other.top)
        shrink, shrink_other = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return _Sums(
            top,
            self.total * shrink + other.total * shrink_other,
            self.out * shrink[..., None] + other.out * shrink_other[..., None],
        )


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, trunk: Trunk, options: AttentionOptions
) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    q = (q * jnp.asarray(options.scale, q.dtype)).reshape(B, T, K, N // K, H)
    q = jnp.moveaxis(q, 1, 3)  # [B, K, G, T, H]
    sums = _over_own(q, k, v, mask, options)
    if options.sinks is not None:  # one more key, whose value is zero
        top = jnp.broadcast_to(options.sinks.reshape(K, -1, 1), sums.top.shape)
        sums = sums.merge(_Sums(top, jnp.ones_like(top), jnp.zeros_like(sums.out)))
    sums = _over_trunk(sums, q, trunk, options)
    out = sums.out / jnp.where(sums.total > 0, sums.total, 1)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q.dtype)


def _over_own(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    options: AttentionOptions,
) -> _Sums:
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    top, total, weights = _softmax(scores, mask, options)
    out = jnp.einsum(
        "BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return _Sums(top, total, out)


def _over_trunk(
    sums: _Sums, q: Float[Array, "B K G T H"], trunk: Trunk, options: AttentionOptions
) -> _Sums:
    """`sums` and attention over the trunk, block by block, over the blocks that a query may see."""
    B, K, G, T, H = q.shape
    used, S, window = trunk.used[0], trunk.mask.k_index.shape[1], trunk.mask.window
    most = SCORE_BYTES_IN_PLACE[options.platform or "cpu"] if trunk.in_place else SCORE_BYTES
    size = S
    while size % 2 == 0 and 4 * B * K * G * T * size > most:
        size //= 2
    # The rows are one matrix for each head of keys, in the order that keys and values are kept in:
    # nothing of the trunk is transposed.
    joined = jnp.moveaxis(q, 1, 0).reshape(K, B * G * T, H)

    def add(sums: _Sums, start: jax.Array | int, size: int) -> _Sums:
        k, v = trunk.read(trunk.kept, start, size)
        mask = of_keys(trunk.mask, lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1))
        scores = jnp.einsum("KMH,KSH->KMS", joined, k[0], preferred_element_type=jnp.float32)
        scores = jnp.moveaxis(scores.reshape(K, B, G, T, size), 0, 1)
        top, total, weights = _softmax(scores, mask, options)
        weights = jnp.moveaxis(weights.astype(v.dtype), 1, 0).reshape(K, B * G * T, size)
        out = jnp.einsum("KMS,KSH->KMH", weights, v[0], preferred_element_type=jnp.float32)
        return sums.merge(_Sums(top, total, jnp.moveaxis(out.reshape(K, B, G, T, H), 0, 1)))

    if window is not None and window <= size:  # it ends at the last token of the trunk or later
        return add(sums, jnp.clip(used - window, 0, S - window), window)
    if size == S:
        return add(sums, 0, S)

    def add_block(i: jax.Array, sums: _Sums) -> _Sums:
        return add(sums, i * size, size)

    first = 0 if window is None else jnp.maximum(used - window, 0) // size
    return jax.lax.fori_loop(first, cdiv(used, size), add_block, sums)


def _softmax(
    scores: Float[Array, "B K G T S"], mask: Mask, options: AttentionOptions
) -> tuple[Float[Array, "B K G T"], Float[Array, "B K G T"], Float[Array, "B K G T S"]]:
    """Top, total and weights, see `_Sums`."""
    see = visible(mask)[:, None, None]
    scores = jnp.where(see, apply_softcap(scores, options.softcap), MASKED)
    top = scores.max(axis=-1)
    weights = jnp.where(see, jnp.exp(scores - top[..., None]), 0)
    return top, weights.sum(axis=-1), weights
