"""cuDNN's flash attention, through `jax.nn.dot_product_attention`, for the masks that it can
express.

It is told no more than "causal" and a window, so that whole rows, and the groups of S2-Attn as rows
of their own, are what it serves. Its form for packed rows is not in jax's public interface, needs
the number of documents in advance, and finds the wrong keys in jax 0.10.2 where N > K
(`_fix_seqlen_offsets` counts by the heads of q).

The gradient of q is summed in whatever order the blocks come. XLA's flags for reproducible programs
make cuDNN sum in one order, in a workspace that may grow with T x T (`use_dp_workspace` in
cudnn-frontend): under them it is not taken.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp

from lljax.attention.mask import Mask
from lljax.attention.saved import kept

REPRODUCIBLE = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=true|=1)?(\s|$)"


def refuses(q, k, mask: Mask, softcap: float | None = None, sinks=None) -> str:
    """Why cuDNN cannot attend with q [B, T, N, H] over k under `mask`; empty where it can."""
    H = q.shape[-1]
    reasons = {
        f"{q.dtype}, only bfloat16 and float16": q.dtype not in (jnp.bfloat16, jnp.float16),
        # 256 on some devices
        f"heads of {H}, only multiples of 8 up to 128": H % 8 or H > 128,
        "tokens that may be out of order": not mask.ordered,
        "several documents in a row": mask.q_segments is not None,
        "anchors": mask.anchors is not None,
        "soft-capped scores": softcap is not None,
        "sinks": sinks is not None,  # it keeps its log-sum-exp to itself
        "a program that XLA_FLAGS wants reproducible": re.search(
            REPRODUCIBLE, os.environ.get("XLA_FLAGS", "")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attend(q, k, v, mask: Mask, *, scale: float, implementation: str = "cudnn") -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, T, K, H] under a mask that is not refused.

    implementation: that of `jax.nn.dot_product_attention`; "xla" does the same on any device.
    """
    B, T = q.shape[:2]
    G = T if mask.group is None else min(mask.group, T)
    shift = 0 if mask.group is None else mask.shift % mask.group
    window = None if mask.window is None or mask.window >= G else (mask.window - 1, 0)
    whole = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )
    return _unfold(kept(whole, *(_fold(x, G, shift) for x in (q, k, v))), B, T, shift)


def _fold(x, G: int, shift: int):
    """[B, T, ...] -> [B * groups, G, ...], the first of `shift` tokens unless that is 0. A short
    group is filled up behind, where causality hides the filling.
    """
    first, rest = x[:, :shift], x[:, shift:]
    rest = _fill(rest, -(-rest.shape[1] // G) * G)
    return (jnp.concatenate([_fill(first, G), rest], axis=1) if shift else rest).reshape(
        -1, G, *x.shape[2:]
    )


def _fill(x, length: int):
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _unfold(x, B: int, T: int, shift: int):
    """The inverse of `_fold` for B rows of T tokens."""
    G, x = x.shape[1], x.reshape(B, -1, *x.shape[2:])
    return (jnp.concatenate([x[:, :shift], x[:, G:]], axis=1) if shift else x)[:, :T]
