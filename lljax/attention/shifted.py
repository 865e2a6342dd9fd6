"""Shifted sparse attention (S2-Attn) of LongLoRA, Chen et al. 2023, arXiv 2309.12307, section 3.2,
without its leak.

Query heads [0, N // 2) attend causally inside groups [0, G) [G, 2G) ...; the others inside groups
moved by half a group, [0, G/2) [G/2, 3G/2) ... The paper rolls the second half of the heads, which
lets the first tokens see the last;
here nothing moves: the two halves differ in their mask only.
"""

import jax
import jax.numpy as jnp

from lljax.attention.attend import attend
from lljax.attention.mask import Mask


def group_size(group: float, T: int) -> int:
    """G in tokens for rows of T: a share of the row below 1 (rounded up to even, at least 2), else
    tokens.
    """
    return int(group) if group >= 1 else max(2, 2 * round(group * T / 2))


def attend_shifted(q, k, v, mask: Mask, *, group: int, sinks=None, **how) -> jax.Array:
    """S2-Attn of q [B, T, N, H] over k, v [B, T, K, H] with groups of `group` (even) tokens;
    returns [B, T, N, H].

    sinks, how: scale, and which implementation, as for `attend`.

    The groups cut whatever `mask` already allows (segments, window). Keys and values are shared by
    the heads that read them, never repeated; any N and K with N % K == 0 will do.
    """
    outs = [
        attend(
            q[:, :, heads],
            k[:, :, shared],
            v[:, :, shared],
            mask.replace(group=group, shift=shift),
            sinks=None if sinks is None else sinks[heads],
            **how,
        )
        for heads, shared, shift in parts(q.shape[2], k.shape[2], group // 2)
    ]
    return jnp.concatenate(outs, axis=2)


def parts(N: int, K: int, half: int):
    """Slices of query heads, the key/value heads that they read evenly, and their shift.

    Where the middle of the query heads falls inside the heads of one key/value head, that one
    stands alone.
    """
    each, middle = N // K, N // 2
    for low, high, shift in ((0, middle, 0), (middle, N, half)):
        edges = sorted(
            {
                low,
                high,
                *(e for e in (-(-low // each) * each, high // each * each) if low < e < high),
            }
        )
        for start, stop in zip(edges, edges[1:]):
            yield slice(start, stop), slice(start // each, -(-stop // each)), shift
