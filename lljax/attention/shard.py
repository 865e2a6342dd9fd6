"""The part of attention that one device computes, and how devices pass arrays on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lljax.attention.attend import attend
from lljax.attention.mask import NEVER, Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.pattern import Groups
from lljax.attention.shifted import attend_shifted
from lljax.parallel.sharding import ROWS, TOKENS, Layout

HEADS = "tensor"
CUT = PartitionSpec(ROWS, TOKENS)  # how [B, T] lies on the mesh
CUT_HEADS = PartitionSpec(ROWS, TOKENS, HEADS)  # ... and [B, T, heads, H]
PER_HEAD = PartitionSpec(HEADS)  # ... and [heads]


@dataclasses.dataclass(frozen=True)
class Shard:
    """size: devices over which the tokens of a row are spread. tensor: devices over which heads
    are. groups: the groups of S2-Attn, None for every head alike. zigzag: the order of the tokens.
    """

    size: int
    tensor: int
    groups: Groups | None
    zigzag: bool

    def heads(self) -> "HeadShare":
        """The heads of this device; inside shard_map."""
        return HeadShare(self.groups, self.tensor, jax.lax.axis_index(HEADS))


@dataclasses.dataclass(frozen=True)
class HeadShare:
    """The device holds the `index`-th of `count` equal parts of the query heads."""

    groups: Groups | None
    count: int = 1
    index: jax.Array | int = 0


def platform_options(options: AttentionOptions, layout: Layout | None) -> AttentionOptions:
    """The options with the platform of the layout."""
    return options.replace(platform=kernel_platform(layout))


def kernel_platform(layout: Layout | None) -> str:
    """The platform whose kernels may run on arrays that lie as in `layout`."""
    if layout is not None:
        return layout.platform
    # Without a layout the compiler may have cut the arrays over several devices, and it cannot cut
    # a kernel: a CPU has none.
    return jax.default_backend() if jax.device_count() == 1 else "cpu"


def attend_heads(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    options: AttentionOptions,
    share: HeadShare,
    *,
    attend: Callable[..., jax.Array] = attend,
) -> Float[Array, "B T N H"]:
    """Attention of the heads of one device.

    attend: attention under one mask, which may reach the keys of other devices.
    """
    if share.groups is None:
        return attend(q, k, v, mask, options)
    if share.count == 1:
        return attend_shifted(q, k, v, mask, share.groups, options, attend=attend)
    return attend(q, k, v, _shift_by_share(mask, share.groups, share), options)


def _shift_by_share(mask: Mask, groups: Groups, share: HeadShare) -> Mask:
    """The mask of the heads of one device, with their groups. Which half they belong to is known at
    run time only: moving every index by the shift moves the groups the other way, and changes
    nothing else, because indices are only ever compared.
    """
    offset = jnp.where(share.index < share.count // 2, 0, groups.shift)
    k_index = jnp.where(mask.k_index == NEVER, NEVER, mask.k_index + offset)
    q_index = mask.q_index + offset
    return mask.replace(q_index=q_index, k_index=k_index, group=groups.size, shift=0)


def attend_local(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, options: AttentionOptions, shard: Shard
) -> jax.Array:
    """Attention of a device that holds every token of its rows."""
    return attend_heads(q, k, v, mask, options, shard.heads())


def pass_on(tree, size: int, by: int = 1):
    """Sends the arrays of every device to the device `by` places after it."""
    order = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, TOKENS, order), tree)


def from_before(last: tuple, size: int) -> tuple:
    """(k, v, k_index, ...) of the device before, given `last` of this device to pass on. The first
    device has none before it: the keys that come round to it are never seen.
    """
    k, v, k_index, *rest = pass_on(last, size)
    return k, v, jnp.where(jax.lax.axis_index(TOKENS) == 0, NEVER, k_index), *rest
