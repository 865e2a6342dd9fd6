"""One operation over a table of implementations."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from lljax.attention import blockwise, cudnn, gpu, tpu
from lljax.attention.mask import Mask
from lljax.attention.saved import SAVED


class UnsupportedMask(ValueError):
    """An implementation that was named cannot serve the mask or the operands."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Either a pair, which a ring can merge: forward(q, k, v, mask, *, scale, softcap) -> (out, lse [B, T, N]) and
    backward(q, k, v, mask, out, lse, d_out, *, scale, softcap, dtype) -> (dq, dk, dv), both as in
    `lljax.attention.blockwise`; or whole(q, k, v, mask, *, scale) -> out, which jax differentiates.

    platforms: where it runs; all if empty. refuses(q, k, mask, softcap) -> why it cannot serve them; empty where it can.
    """

    forward: Callable | None = None
    backward: Callable | None = None
    whole: Callable | None = None
    platforms: tuple[str, ...] = ()
    refuses: Callable = lambda q, k, mask, softcap: ""


# In order of preference.
IMPLEMENTATIONS = {"tpu": Implementation(tpu.forward, tpu.backward, platforms=("tpu",)),
                   "cudnn": Implementation(whole=cudnn.attend, platforms=("gpu",), refuses=cudnn.refuses),
                   "triton": Implementation(gpu.forward, gpu.backward, platforms=("gpu",)),
                   "blockwise": Implementation(blockwise.forward, blockwise.backward)}


def attend(q, k, v, mask: Mask, *, scale: float, softcap: float | None = None,
           implementation: str | Implementation | None = None, platform: str | None = None) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] under `mask`; returns [B, T, N, H]. softcap: of the scaled scores,
    see lljax.attention.softcap.

    Query head n reads key/value head n // (N / K). `implementation=None` takes the first that serves on `platform`
    (cpu | gpu | tpu; None for that of this process).

    Raises:
      UnsupportedMask: the named implementation cannot serve the mask or the operands.
      ValueError: no implementation has that name.
    """
    if implementation is None:
        implementation = best(platform or jax.default_backend(), q, k, mask, softcap)
    if isinstance(implementation, str):
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
        name, implementation = implementation, IMPLEMENTATIONS[implementation]
        if reason := implementation.refuses(q, k, mask, softcap):
            raise UnsupportedMask(f"attention implementation {name!r} cannot serve {reason}: leave it out, and the first "
                                  "that can is taken")
    if implementation.whole is not None:
        return implementation.whole(q, k, v, mask, scale=scale)
    return _attend(implementation, scale, softcap, q, k, v, mask)


def best(platform: str, q, k, mask: Mask, softcap: float | None = None) -> str:
    """The name of the first implementation of the table that runs on `platform` and refuses nothing."""
    return next(name for name, of in IMPLEMENTATIONS.items()
                if (not of.platforms or platform in of.platforms) and not of.refuses(q, k, mask, softcap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(implementation, scale, softcap, q, k, v, mask):
    return implementation.forward(q, k, v, mask, scale=scale, softcap=softcap)[0]


def _attend_forward(implementation, scale, softcap, q, k, v, mask):
    out, lse = implementation.forward(q, k, v, mask, scale=scale, softcap=softcap)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return out, (q, k, v, mask, out, lse)


def _attend_backward(implementation, scale, softcap, saved, d_out):
    return *implementation.backward(*saved, d_out, scale=scale, softcap=softcap, dtype=saved[0].dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
