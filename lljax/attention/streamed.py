"""Attention of a row a tile at a time, for groups and windows: a tile needs its own keys and the
few keys before it.

The tiles of a device follow one another, and each passes its last keys to the next one. The first
tile gets the last keys of the device before, as in the halo mode of
`lljax.attention.context_parallel`. The queries, keys and values of a whole row never exist.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.mask import NEVER, Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.pattern import Groups
from lljax.attention.shard import (
    CUT,
    CUT_HEADS,
    HEADS,
    PER_HEAD,
    HeadShare,
    attend_heads,
    from_before,
    platform_options,
)
from lljax.parallel.sharding import Layout, token_parts

HALO = (CUT_HEADS, CUT_HEADS, CUT, CUT)  # how (k, v, k_index, k_segments) lie on the mesh
Halo = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def tile_reach(
    T: int, mask: Mask, groups: Groups | None, tile: int, layout: Layout | None
) -> int | None:
    """How many tokens before a tile its first query may see, if rows of T tokens can go `tile`
    tokens of a device at a time. None if they cannot: full attention and anchors look back too far,
    and so do groups and windows much longer than a tile, and branches, to the end of their trunk.
    """
    if (
        mask.anchors is not None
        or mask.q_trunks is not None
        or layout is not None
        and (layout.zigzag or layout.context_parallel not in ("none", "halo"))
    ):
        return None
    local = T // token_parts(layout)
    starts = [device + start for device in range(0, T, local) for start in range(0, local, tile)]
    limits = [T]
    if mask.window is not None:
        limits.append(mask.window - 1)
    if groups is not None:
        shifts = (0, groups.shift)
        limits.append(max((start + shift) % groups.size for start in starts for shift in shifts))
    return min(limits) if min(limits) <= tile else None


def first_halo(
    keys: Callable[..., tuple], xs: tuple, mask: Mask, reach: int, layout: Layout | None
) -> Halo:
    """The last `reach` tokens before every device, each device's own part of the arrays: k, v [B,
    reach, K, H], k_index, k_segments [B, reach]. No query sees them on the first device.

    keys: `keys(*xs)` returns k and v of any of the tokens of xs [B, T, ...].
    """
    devices = token_parts(layout)

    def last(x):  # [B, T, ...] -> the last tokens of each device, [B, devices * reach, ...]
        x = x.reshape(x.shape[0], devices, -1, *x.shape[2:])
        return x[:, :, x.shape[2] - reach :].reshape(x.shape[0], devices * reach, *x.shape[3:])

    xs, index, segments = jax.tree.map(last, (xs, mask.k_index, mask.k_segments))
    if layout is None or devices == 1:
        k, v = (jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(keys, *xs))
        return k, v, jnp.full_like(index, NEVER), segments
    return jax.shard_map(
        lambda *halo: from_before(halo, devices),
        mesh=layout.mesh,
        in_specs=HALO,
        out_specs=HALO,
        check_vma=False,
    )(*keys(*xs), index, segments)


def attend_tile(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    halo: Halo,
    options: AttentionOptions,
    *,
    groups: Groups | None,
    layout: Layout | None,
) -> tuple[Float[Array, "B T N H"], Halo]:
    """Attention of q over `halo` and k, v, of a tile of every device; and the next tile's halo.

    mask: the mask of the T tokens of the tile, in the order of the row. options, groups: as in
      `attend_parallel`.
    """
    options = platform_options(options, layout)
    shares = 1 if layout is None else layout.mesh.shape[HEADS]

    def run(q, k, v, mask: Mask, options: AttentionOptions, halo: Halo):
        k, v, index, segments = jax.tree.map(
            lambda before, tile: jnp.concatenate([before, tile], axis=1),
            halo,
            (k, v, mask.k_index, mask.k_segments),
        )
        share = HeadShare(groups, shares, 0 if shares == 1 else jax.lax.axis_index(HEADS))
        mask = mask.replace(k_index=index, k_segments=segments)
        out = attend_heads(q, k, v, mask, options, share)
        return out, jax.tree.map(
            lambda x, before: x[:, x.shape[1] - before.shape[1] :], (k, v, index, segments), halo
        )

    if layout is None:
        return run(q, k, v, mask, options, halo)
    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(CUT_HEADS, CUT_HEADS, CUT_HEADS, CUT, PER_HEAD, HALO),
        out_specs=(CUT_HEADS, HALO),
        check_vma=False,
    )(q, k, v, mask, options, halo)
