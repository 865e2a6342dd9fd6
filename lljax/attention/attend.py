"""One operation over a table of implementations."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from lljax.attention import blockwise, gpu, tpu
from lljax.attention.mask import Mask

# What memory.remat = "attention" keeps of a layer.
SAVED = ("attention_out", "attention_lse")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """forward(q, k, v, mask, *, scale) -> (out, lse [B, T, N]); backward(q, k, v, mask, out, lse, d_out, *, scale,
    dtype) -> (dq, dk, dv). Both as in `lljax.attention.blockwise`, and for every mask. platforms: where it runs; all if empty.
    """

    forward: Callable
    backward: Callable
    platforms: tuple[str, ...] = ()


# In order of preference.
IMPLEMENTATIONS = {"tpu": Implementation(tpu.forward, tpu.backward, ("tpu",)),
                   "triton": Implementation(gpu.forward, gpu.backward, ("gpu",)),
                   "blockwise": Implementation(blockwise.forward, blockwise.backward)}


def attend(q, k, v, mask: Mask, *, scale: float, implementation: str | Implementation | None = None) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] under `mask`; returns [B, T, N, H].

    Query head n reads key/value head n // (N / K). `implementation=None` takes the best for the platform of this process.

    Raises:
      ValueError: no implementation has that name.
    """
    if implementation is None:
        implementation = best(jax.default_backend())
    if isinstance(implementation, str):
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
        implementation = IMPLEMENTATIONS[implementation]
    return _attend(implementation, scale, q, k, v, mask)


def best(platform: str) -> str:
    """The name of the first implementation of the table that runs on `platform` (cpu | gpu | tpu)."""
    return next(name for name, of in IMPLEMENTATIONS.items() if not of.platforms or platform in of.platforms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, scale, q, k, v, mask):
    return implementation.forward(q, k, v, mask, scale=scale)[0]


def _attend_forward(implementation, scale, q, k, v, mask):
    out, lse = implementation.forward(q, k, v, mask, scale=scale)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return out, (q, k, v, mask, out, lse)


def _attend_backward(implementation, scale, saved, d_out):
    return *implementation.backward(*saved, d_out, scale=scale, dtype=saved[0].dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
