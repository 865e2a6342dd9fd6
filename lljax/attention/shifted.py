"""Shifted sparse attention (S2-Attn) of LongLoRA, Chen et al. 2023, arXiv 2309.12307, section 3.2,
without its leak.

Query heads [0, N // 2) attend causally inside groups [0, G) [G, 2G) ...; the others inside groups
moved by half a group, [0, G/2) [G/2, 3G/2) ... The paper rolls the second half of the heads, which
lets the first tokens see the last; here nothing moves: the two halves differ in their mask only.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.attend import attend
from lljax.attention.mask import Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.pattern import Groups
from lljax.parallel.rounding import cdiv, round_up


def attend_shifted(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    groups: Groups,
    options: AttentionOptions,
    *,
    attend: Callable[..., jax.Array] = attend,
) -> Float[Array, "B T N H"]:
    """S2-Attn of q over k and v.

    The groups cut whatever `mask` already allows (segments, window). Keys and values are shared by
    the heads that read them, never repeated; any N and K with N % K == 0 will do.
    attend: attention of some heads, which may lie on several devices.
    """
    outs = [
        attend(
            q[:, :, heads],
            k[:, :, shared],
            v[:, :, shared],
            mask.replace(group=groups.size, shift=shift),
            options.of_heads(heads),
        )
        for heads, shared, shift in head_slices(q.shape[2], k.shape[2], groups)
    ]
    return jnp.concatenate(outs, axis=2)


def head_slices(N: int, K: int, groups: Groups) -> Iterator[tuple[slice, slice, int]]:
    """Slices of the N query heads, the slices of the K key/value heads that they read evenly, and
    the shift of their groups.

    A key/value head that both halves of the query heads read stands alone in two slices.
    """
    R, middle = N // K, N // 2
    for low, high, shift in ((0, middle, 0), (middle, N, groups.shift)):
        inner = (edge for edge in (round_up(low, R), high // R * R) if low < edge < high)
        edges = sorted({low, high, *inner})
        for start, stop in zip(edges, edges[1:], strict=False):
            yield slice(start, stop), slice(start // R, cdiv(stop, R)), shift
