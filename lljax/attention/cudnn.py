"""cuDNN's flash attention, through `jax.nn.dot_product_attention`, for the masks that it can
express.

The interface takes "causal" and a window, so that it serves whole rows, and the groups of S2-Attn
as rows of their own. Its form for packed rows is not in jax's public interface, needs the number of
documents in advance, and finds the wrong keys in jax 0.10.2 if N > K (`_fix_seqlen_offsets` counts
by the heads of q).

The gradient of q is summed in whatever order the blocks come. XLA's flags for reproducible programs
make cuDNN sum in one order, in a workspace that may grow with T x T (`use_dp_workspace` in
cudnn-frontend): under them it refuses.
"""

import functools
import os
import re
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention.blocks import pad_tokens
from lljax.attention.mask import Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.saved import name_residuals
from lljax.parallel.rounding import round_up

REPRODUCIBLE = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=true|=1)?(\s|$)"


def refuses(q: jax.Array, k: jax.Array, mask: Mask, options: AttentionOptions) -> str:
    """Why cuDNN cannot serve q [B, T, N, H] over k under `mask`; "" if it can."""
    H = q.shape[-1]
    reasons = {
        f"{q.dtype}, only bfloat16 and float16": q.dtype not in (jnp.bfloat16, jnp.float16),
        # 256 on some devices
        f"heads of {H}, only multiples of 8 up to 128": H % 8 or H > 128,
        "answers that share a prompt": mask.q_trunks is not None,
        "tokens that may be out of order": not mask.ordered,
        "several documents in a row": mask.q_segments is not None,
        "anchors": mask.anchors is not None,
        "soft-capped scores": options.softcap is not None,
        "sinks": options.sinks is not None,  # it does not return its log-sum-exp
        "a program that XLA_FLAGS wants reproducible": re.search(
            REPRODUCIBLE, os.environ.get("XLA_FLAGS", "")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention of q over k and v under a mask that `refuses` accepts.

    implementation: for `jax.nn.dot_product_attention`; "xla" computes the same on any device.
    """
    B, T = q.shape[:2]
    G = T if mask.group is None else min(mask.group, T)
    shift = 0 if mask.group is None else mask.shift % mask.group
    window = None if mask.window is None or mask.window >= G else (mask.window - 1, 0)
    whole = functools.partial(
        jax.nn.dot_product_attention,
        scale=options.scale,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )
    return _unfold(name_residuals(whole, *(_fold(x, G, shift) for x in (q, k, v))), B, T, shift)


def _fold(x: jax.Array, G: int, shift: int) -> jax.Array:
    """[B, T, ...] -> [B * groups, G, ...], the first of `shift` tokens unless that is 0. A short
    group is padded at its end, which causality hides.
    """
    first, rest = x[:, :shift], x[:, shift:]
    rest = pad_tokens(rest, round_up(rest.shape[1], G))
    x = jnp.concatenate([pad_tokens(first, G), rest], axis=1) if shift else rest
    return x.reshape(-1, G, *x.shape[2:])


def _unfold(x: jax.Array, B: int, T: int, shift: int) -> jax.Array:
    """The inverse of `_fold` for B rows of T tokens."""
    G, x = x.shape[1], x.reshape(B, -1, *x.shape[2:])
    return (jnp.concatenate([x[:, :shift], x[:, G:]], axis=1) if shift else x)[:, :T]
