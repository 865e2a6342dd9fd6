"""Attention over tokens that are spread over the devices of the mesh axis `sequence`.

  allgather  every device gathers all keys and values; in zigzag order for balance. Liu et al. call
             its cost "relatively cheap": bytes 2 T K H a layer.
  ulysses    heads are exchanged for tokens, so that a device attends for some heads over all tokens
             (Jacobs et al. 2023, arXiv 2309.14509). More devices than key/value heads: the rest is
             gathered.
  ring       keys and values go round, a neighbour at a time; memory O(T / devices) (Liu et al.
  2023, arXiv 2310.01889).
  halo       for groups and windows: a device fetches the few tokens before its own. Bytes do not
    grow with T.

Each is exact for every mask it takes, in value and gradient; `choose` says which, and why.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lljax.attention.attend import IMPLEMENTATIONS, Implementation, attend, best, sink_gradient
from lljax.attention.mask import NEVER, Mask
from lljax.attention.shifted import attend_shifted, parts
from lljax.errors import ConfigError
from lljax.parallel.sharding import ROWS, TOKENS, Layout

HEADS = "tensor"
CUT = PartitionSpec(ROWS, TOKENS)  # how [B, T] lies on the mesh
CUT_HEADS = PartitionSpec(ROWS, TOKENS, HEADS)  # ... and [B, T, heads, H]
PER_HEAD = PartitionSpec(HEADS)  # ... and [heads]


def attend_parallel(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks=None,
    group: int | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, T, K, H], all cut by `layout` over rows, tokens and
    heads.

    sinks [N]: see `attend`. group: S2-Attn in groups of as many tokens, on top of `mask`; None for
    every head alike.
    """
    how = how_of(scale, softcap, layout)
    if layout is None:
        return attend_heads(q, k, v, mask, sinks, group, 1, 0, how)
    size, tensor = layout.mesh.shape[TOKENS], layout.mesh.shape[HEADS]
    mode = {
        "none": _local,
        "allgather": _allgather,
        "ulysses": _ulysses,
        "ring": _ring_mode,
        "halo": _halo,
    }[layout.context_parallel]

    def run(q, k, v, mask, sinks):
        return mode(
            q, k, v, mask, sinks, group, size=size, tensor=tensor, how=how, zigzag=layout.zigzag
        )

    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(CUT_HEADS, CUT_HEADS, CUT_HEADS, CUT, PER_HEAD),
        out_specs=CUT_HEADS,
        check_vma=False,
    )(q, k, v, mask, sinks)


@dataclasses.dataclass(frozen=True)
class How:
    """What every mode passes on to the attention of a device."""

    scale: float
    softcap: float | None
    platform: str

    @property
    def kwargs(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap, "platform": self.platform}


def how_of(scale: float, softcap: float | None, layout: Layout | None) -> How:
    if layout is not None:
        return How(scale, softcap, layout.platform)
    # Of several devices the compiler may have cut the arrays, and it cannot cut a kernel: a CPU has
    # none.
    return How(scale, softcap, jax.default_backend() if jax.device_count() == 1 else "cpu")


def attend_heads(
    q, k, v, mask: Mask, sinks, group: int | None, shares: int, share, how: How
) -> jax.Array:
    """Attention where the device holds the `share`-th of `shares` equal parts of the query heads,
    and their sinks.
    """
    if group is None:
        return attend(q, k, v, mask, sinks=sinks, **how.kwargs)
    if shares == 1:
        return attend_shifted(q, k, v, mask, group=group, sinks=sinks, **how.kwargs)
    return attend(q, k, v, _shift_by_share(mask, group, shares, share), sinks=sinks, **how.kwargs)


def _shift_by_share(mask: Mask, group: int, shares: int, share) -> Mask:
    """The groups of the heads of one device. Which half they are of is known at run time only;
    moving every index by half a group moves the groups the other way, and changes nothing else, for
    indices are only ever compared.
    """
    offset = jnp.where(share < shares // 2, 0, group // 2)
    k_index = jnp.where(mask.k_index == NEVER, NEVER, mask.k_index + offset)
    return mask.replace(q_index=mask.q_index + offset, k_index=k_index, group=group, shift=0)


def share_of_heads():
    return jax.lax.axis_index(HEADS)


# ---------------------------------------------------------------- none, allgather
def _local(q, k, v, mask, sinks, group, *, size, tensor, how, zigzag):
    return attend_heads(q, k, v, mask, sinks, group, tensor, share_of_heads(), how)


def _allgather(q, k, v, mask, sinks, group, *, size, tensor, how, zigzag):
    def gather(x):
        x = jax.lax.all_gather(x, TOKENS, axis=1, tiled=True)
        return _in_order(x, size) if zigzag else x

    return attend_heads(
        q, gather(k), gather(v), _of_keys(mask, gather), sinks, group, tensor, share_of_heads(), how
    )


def _in_order(x, size: int):
    """[B, S, ...] from the order of `lljax.parallel.sharding.zigzag` back into that of the row. The
    mask does not ask for it: the ranges of the blocks of a kernel are narrow only so.
    """
    # chunk j is with device i = min(j, 2 size - 1 - j), its first or its second
    chunks = jnp.split(x, 2 * size, axis=1)
    return jnp.concatenate(
        [chunks[2 * min(j, 2 * size - 1 - j) + (j >= size)] for j in range(2 * size)], axis=1
    )


def _of_keys(mask: Mask, change) -> Mask:
    """The mask with its key arrays changed."""

    def one(x):
        return None if x is None else change(x)

    return mask.replace(
        k_index=one(mask.k_index), k_segments=one(mask.k_segments), anchors=one(mask.anchors)
    )


# ---------------------------------------------------------------- ulysses
def ulysses_size(size: int, N: int, K: int) -> int:
    """Devices among which heads are exchanged: as many as both kinds of heads can be dealt to, of
    the `size`.
    """
    return math.gcd(size, math.gcd(N, K))


def _ulysses(q, k, v, mask, sinks, group, *, size, tensor, how, zigzag):
    u = ulysses_size(size, q.shape[2], k.shape[2])
    near = [[i * u + j for j in range(u)] for i in range(size // u)]  # who exchange heads
    # who hold the same heads afterwards
    far = [[i * u + j for i in range(size // u)] for j in range(u)]
    deal = functools.partial(
        jax.lax.all_to_all,
        axis_name=TOKENS,
        split_axis=2,
        concat_axis=1,
        tiled=True,
        axis_index_groups=near,
    )

    def gather(x, groups):
        return jax.lax.all_gather(x, TOKENS, axis=1, tiled=True, axis_index_groups=groups)

    place, dealt = jax.lax.axis_index(TOKENS) % u, q.shape[2] // u
    if sinks is not None:
        sinks = jax.lax.dynamic_slice_in_dim(sinks, place * dealt, dealt)
    q, k, v = deal(q), deal(k), deal(v)
    mask = jax.tree.map(lambda x: gather(x, near), mask)
    if size > u:
        k, v = gather(k, far), gather(v, far)
        mask = _of_keys(mask, lambda x: gather(x, far))
    out = attend_heads(q, k, v, mask, sinks, group, tensor * u, share_of_heads() * u + place, how)
    return jax.lax.all_to_all(
        out, TOKENS, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=near
    )


# ---------------------------------------------------------------- ring
def _ring_mode(q, k, v, mask, sinks, group, *, size, tensor, how, zigzag):
    hops = size - 1 if zigzag else _hops(mask, group, q.shape[1], size)
    if group is None:
        return _ring(hops, size, how, q, k, v, mask, sinks)
    if tensor > 1:
        return _ring(
            hops, size, how, q, k, v, _shift_by_share(mask, group, tensor, share_of_heads()), sinks
        )
    return jnp.concatenate(
        [
            _ring(
                hops,
                size,
                how,
                q[:, :, heads],
                k[:, :, shared],
                v[:, :, shared],
                mask.replace(group=group, shift=shift),
                _some(sinks, heads),
            )
            for heads, shared, shift in parts(q.shape[2], k.shape[2], group // 2)
        ],
        axis=2,
    )


def _some(sinks, heads):
    return None if sinks is None else sinks[heads]


def _hops(mask: Mask, group: int | None, T: int, size: int) -> int:
    """How many neighbours back a query of a device of T tokens may look; the others' steps would be
    empty.
    """
    limits = (size * T, group, mask.window if mask.anchors is None else None)
    reach = min(limit for limit in limits if limit is not None)
    return min(size - 1, -(-(reach - 1) // T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(hops, size, how, q, k, v, mask, sinks):
    return _ring_forward(hops, size, how, q, k, v, mask, sinks)[0]


def _pair(how: How, q, k, mask: Mask) -> Implementation:
    """What attends to one chunk of the keys, which are not those of the queries."""
    return IMPLEMENTATIONS[best(how.platform, q, k, mask.replace(ordered=False), how.softcap)]


def _chunk(k, v, mask):
    """What goes round: keys, values, and what the mask knows of them."""
    return k, v, mask.k_index, mask.k_segments, mask.anchors


def _pass_on(tree, size, by=1):
    """Every device's arrays go to the one `by` places after it."""
    order = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, TOKENS, order), tree)


def _ring_forward(hops, size, how, q, k, v, mask, sinks):
    forward = _pair(how, q, k, mask).forward

    def attend_chunk(out, lse, k, v, k_index, k_segments, anchors):
        """Merges attention over one chunk into the output and its log-sum-exp, in float32."""
        chunk_out, chunk_lse = forward(
            q,
            k,
            v,
            mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors),
            scale=how.scale,
            softcap=how.softcap,
        )
        new = jnp.logaddexp(lse, chunk_lse)
        return out * jnp.exp(lse - new)[..., None] + chunk_out * jnp.exp(chunk_lse - new)[
            ..., None
        ], new

    def step(carry, _):
        out, lse, chunk = carry
        following = _pass_on(chunk, size)  # under way while this chunk is computed with
        return (*attend_chunk(out, lse, *chunk), following), None

    # A sink is a key that every query has seen already.
    out, lse = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(q.shape[:3], -jnp.inf if sinks is None else sinks, jnp.float32),
    )
    (out, lse, chunk), _ = jax.lax.scan(step, (out, lse, _chunk(k, v, mask)), length=hops)
    out, lse = attend_chunk(out, lse, *chunk)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, sinks, out, lse)


def _ring_backward(hops, size, how, saved, d_out):
    q, k, v, mask, sinks, out, lse = saved
    pair = _pair(how, q, k, mask)

    def backward(k, v, k_index, k_segments, anchors):
        return pair.backward(
            q,
            k,
            v,
            mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors),
            out,
            lse,
            d_out,
            scale=how.scale,
            softcap=how.softcap,
        )

    def step(carry, _):
        dq, chunk, d_chunk = carry
        following = _pass_on(chunk, size)
        dq_part, *d_part = backward(*chunk)
        d_chunk = _pass_on(jax.tree.map(jnp.add, d_chunk, tuple(d_part)), size)
        return (dq + dq_part, following, d_chunk), None

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    carry, _ = jax.lax.scan(
        step, (jnp.zeros(q.shape, jnp.float32), _chunk(k, v, mask), empty), length=hops
    )
    dq, chunk, d_chunk = carry
    dq_part, *d_part = backward(*chunk)
    dk, dv = _pass_on(jax.tree.map(jnp.add, d_chunk, tuple(d_part)), size, by=-hops)
    return (
        (dq + dq_part).astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        None,
        sink_gradient(sinks, out, lse, d_out),
    )


_ring.defvjp(_ring_forward, _ring_backward)


# ---------------------------------------------------------------- halo
def halo_size(T: int, size: int, *, window: int | None, group: int | None, shift: int = 0) -> int:
    """Tokens before its own that a device of T of `size` devices needs for its first query."""
    limits = [(size - 1) * T]
    if window is not None:
        limits.append(window - 1)
    if group is not None:
        limits.append(max((i * T + (group - shift) % group) % group for i in range(1, size)))
    return min(limits)


def _halo(q, k, v, mask, sinks, group, *, size, tensor, how, zigzag):
    if group is None:
        return _with_halo(q, k, v, mask, sinks, size, how)
    T = q.shape[1]
    if tensor > 1:
        reach = max(
            halo_size(T, size, window=mask.window, group=group, shift=shift)
            for shift in (0, group // 2)
        )
        return _with_halo(
            q, k, v, _shift_by_share(mask, group, tensor, share_of_heads()), sinks, size, how, reach
        )
    return jnp.concatenate(
        [
            _with_halo(
                q[:, :, heads],
                k[:, :, shared],
                v[:, :, shared],
                mask.replace(group=group, shift=shift),
                _some(sinks, heads),
                size,
                how,
            )
            for heads, shared, shift in parts(q.shape[2], k.shape[2], group // 2)
        ],
        axis=2,
    )


def _with_halo(q, k, v, mask, sinks, size, how, reach=None):
    if reach is None:
        reach = halo_size(q.shape[1], size, window=mask.window, group=mask.group, shift=mask.shift)
    if mask.anchors is not None:
        return _with_anchors(q, k, v, mask, sinks, size, how, reach)
    return attend(q, *_extended(k, v, mask, size, reach), sinks=sinks, **how.kwargs)


def _extended(k, v, mask, size, reach):
    """k, v and the mask with the last `reach` tokens of the device before in front."""
    if reach == 0:
        return k, v, mask
    last = jax.tree.map(
        lambda x: x[:, -reach:], (k, v, mask.k_index, mask.k_segments, mask.anchors)
    )
    k, v, k_index, k_segments, anchors = jax.tree.map(
        lambda before, own: jnp.concatenate([before, own], axis=1),
        from_before(last, size),
        (k, v, mask.k_index, mask.k_segments, mask.anchors),
    )
    return k, v, mask.replace(k_index=k_index, k_segments=k_segments, anchors=anchors)


def from_before(last, size):
    """(k, v, k_index, ...) of the device before, given one's own to pass on. The first device has
    none before it: what comes round to it is never seen.
    """
    k, v, k_index, *rest = _pass_on(last, size)
    return k, v, jnp.where(jax.lax.axis_index(TOKENS) == 0, NEVER, k_index), *rest


def _with_anchors(q, k, v, mask, sinks, size, how, reach):
    """Window and anchors: the halo serves what is near, and each device sends the others its
    anchors, as many as there is room for. A row with more of them on one device than that gathers
    all its keys.
    """
    room = max(1, min(k.shape[1], k.shape[1] // 8 + 128))
    fits = jax.lax.pmax(jnp.max(mask.anchors.sum(1)), TOKENS) <= room

    def near_and_anchors(q, k, v, mask):
        order = jnp.argsort(~mask.anchors, axis=1, stable=True)[:, :room]
        gather = functools.partial(jax.lax.all_gather, axis_name=TOKENS, axis=1, tiled=True)

        def anchors_of(x):  # [B, T, ...] -> [B, size * room, ...]
            return gather(
                jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
            )

        far = _of_keys(mask, anchors_of)
        # An anchor of one's own or of the halo is there already; a place that holds no anchor is no
        # key.
        first = jnp.min(mask.q_index, axis=1, keepdims=True)
        far = far.replace(
            k_index=jnp.where(far.anchors & (far.k_index < first - reach), far.k_index, NEVER)
        )
        near_k, near_v, near = _extended(k, v, mask, size, reach)
        join = functools.partial(jnp.concatenate, axis=1)
        both = near.replace(
            k_index=join([far.k_index, near.k_index]),
            anchors=join([far.anchors, near.anchors]),
            k_segments=None if near.k_segments is None else join([far.k_segments, near.k_segments]),
        )
        return attend(
            q,
            join([anchors_of(k), near_k]),
            join([anchors_of(v), near_v]),
            both,
            sinks=sinks,
            **how.kwargs,
        )

    def everything(q, k, v, mask):
        gather = functools.partial(jax.lax.all_gather, axis_name=TOKENS, axis=1, tiled=True)
        return attend(q, gather(k), gather(v), _of_keys(mask, gather), sinks=sinks, **how.kwargs)

    return jax.lax.cond(fits, near_and_anchors, everything, q, k, v, mask)


# ---------------------------------------------------------------- the choice
def choose(
    wanted: str,
    *,
    T: int,
    size: int,
    tensor: int,
    N: int,
    K: int,
    H: int,
    group: int | None,
    windows,
    bytes_per: int = 2,
    room: float = math.inf,
    refused: Mapping[str, str] | None = None,
    ordered: bool = False,
) -> tuple[str, bool, str]:
    """(mode, zigzag, reason) for rows of T tokens on `size` devices; `wanted` is a mode or "auto".

    windows: the window of each layer, None for a layer without. room: bytes for gathered keys and
      values. refused: modes that a mixer of the model cannot run under, with the reason. ordered: a
      mixer needs the tokens in the order of the row.

    Raises:
      ConfigError: the wanted mode, or no mode, can serve this model, or T cannot be cut.
    """
    if size == 1:
        return "none", False, "one device holds every token of its rows"
    if T % size:
        raise ConfigError(
            f"rows of {T} tokens cannot be cut over mesh.sequence={size}: use a multiple, such as "
            f"{-(-T // size) * size}"
        )
    local, N, K = T // size, N // tensor, K // tensor
    refusals = dict(refused or {})
    reaches = [
        halo_size(local, size, window=window, group=group, shift=shift)
        for window in set(windows)
        for shift in ((0,) if group is None else (0, group // 2))
    ]
    if max(reaches) > local:
        refusals["halo"] = f"a query looks {max(reaches)} tokens back and a device holds {local}"
    u = ulysses_size(size, N, K)
    if u == 1:
        refusals["ulysses"] = f"{N} query and {K} key/value heads cannot be dealt to {size} devices"
    elif group is not None and u * tensor % 2:
        refusals["ulysses"] = (
            f"dealt to {u} devices, the heads of the two halves of S2-Attn do not part"
        )
    if wanted in refusals:
        raise ConfigError(
            f"mesh.context_parallel={wanted!r} with rows of {T} tokens on mesh.sequence={size}: "
            f"{refusals[wanted]}; use 'auto'"
        )
    cost = {  # bytes that a device receives, a third of a layer's step
        "halo": 2 * max(reaches) * K * H * bytes_per,
        "ulysses": (2 * N + 2 * K) * local * H * (u - 1) / u * bytes_per
        + 2 * (T - local * u) * K / u * H * bytes_per,
        "allgather": 2 * (T - local) * K * H * bytes_per,
        # it goes round in float32 on the way back
        "ring": 2 * (T - local) * K * H * bytes_per * 5 / 3,
    }
    gathered = 2 * T * K * H * bytes_per
    if wanted == "auto":
        if gathered > room:
            refusals["allgather"] = f"the keys and values of a layer are {gathered / 1e9:.1f} GB"
        usable = [mode for mode in cost if mode not in refusals]
        if not usable:
            reasons = "; ".join(f"{mode}: {why}" for mode, why in refusals.items())
            raise ConfigError(
                f"mesh.sequence={size}: no context-parallel mode serves this model ({reasons}): set "
                "mesh.sequence=1 and spread rows and weights with mesh.fsdp"
            )
        wanted = min(usable, key=cost.__getitem__)
        reason = "fewest bytes" + "".join(f"; no {mode}: {why}" for mode, why in refusals.items())
    else:
        reason = "as configured"
    balanced = wanted in ("allgather", "ring") and group is None and T % (2 * size) == 0
    balanced = balanced and not ordered
    return wanted, balanced, f"{cost[wanted] / 1e6:.1f} MB a layer and device ({reason})"
