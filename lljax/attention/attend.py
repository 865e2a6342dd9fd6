"""One operation over a table of implementations."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lljax.attention import blockwise, cudnn, gpu, tpu
from lljax.attention.mask import Mask
from lljax.attention.saved import SAVED


class UnsupportedMask(ValueError):
    """An implementation that was named cannot serve the mask or the operands."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Either a pair, which a ring can merge: forward(q, k, v, mask, *, scale, softcap) -> (out, lse
    [B, T, N]) and backward(q, k, v, mask, out, lse, d_out, *, scale, softcap, dtype) -> (dq, dk,
    dv), both as in `lljax.attention.blockwise`; or whole(q, k, v, mask, *, scale) -> out, which jax
    differentiates.

    platforms: where it runs; all if empty. refuses(q, k, mask, softcap, sinks) -> why it cannot
      serve them; empty where it can.
    """

    forward: Callable | None = None
    backward: Callable | None = None
    whole: Callable | None = None
    platforms: tuple[str, ...] = ()
    refuses: Callable = lambda q, k, mask, softcap, sinks: ""


# In order of preference.
IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.forward, tpu.backward, platforms=("tpu",)),
    "cudnn": Implementation(whole=cudnn.attend, platforms=("gpu",), refuses=cudnn.refuses),
    "triton": Implementation(gpu.forward, gpu.backward, platforms=("gpu",)),
    "blockwise": Implementation(blockwise.forward, blockwise.backward),
}


def attend(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks=None,
    implementation: str | Implementation | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] under `mask`; returns [B, T, N, H].
    softcap: of the scaled scores, see lljax.attention.softcap. sinks [N]: of each head a score
    beside those of the keys, which takes weight and has no value.

    Query head n reads key/value head n // (N / K). `implementation=None` takes the first that
    serves on `platform` (cpu | gpu | tpu; None for that of this process).

    Raises:
      UnsupportedMask: the named implementation cannot serve the mask or the operands.
      ValueError: no implementation has that name.
    """
    if implementation is None:
        implementation = best(platform or jax.default_backend(), q, k, mask, softcap, sinks)
    if isinstance(implementation, str):
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
            )
        name, implementation = implementation, IMPLEMENTATIONS[implementation]
        if reason := implementation.refuses(q, k, mask, softcap, sinks):
            raise UnsupportedMask(
                f"attention implementation {name!r} cannot serve {reason}: leave it out, and the first "
                "that can is taken"
            )
    if implementation.whole is not None:
        return implementation.whole(q, k, v, mask, scale=scale)
    return _attend(implementation, scale, softcap, q, k, v, mask, sinks)


def best(platform: str, q, k, mask: Mask, softcap: float | None = None, sinks=None) -> str:
    """The name of the first implementation of the table that runs on `platform` and refuses
    nothing.
    """
    return next(
        name
        for name, of in IMPLEMENTATIONS.items()
        if (not of.platforms or platform in of.platforms)
        and not of.refuses(q, k, mask, softcap, sinks)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(implementation, scale, softcap, q, k, v, mask, sinks):
    return _attend_forward(implementation, scale, softcap, q, k, v, mask, sinks)[0]


def _attend_forward(implementation, scale, softcap, q, k, v, mask, sinks):
    out, lse = implementation.forward(q, k, v, mask, scale=scale, softcap=softcap)
    if sinks is not None:  # one more key, merged as a ring merges those of another device
        every = jnp.logaddexp(lse, sinks.astype(lse.dtype))
        out, lse = (out * jnp.exp(lse - every)[..., None]).astype(out.dtype), every
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return out, (q, k, v, mask, out, lse, sinks)


def _attend_backward(implementation, scale, softcap, saved, d_out):
    *saved, sinks = saved
    gradients = implementation.backward(
        *saved, d_out, scale=scale, softcap=softcap, dtype=saved[0].dtype
    )
    return *gradients, None, sink_gradient(sinks, *saved[4:], d_out)


def sink_gradient(sinks, out, lse, d_out):
    """That of `sinks` [N], if there are any, given the results of attention with them: that of a
    key whose value is zero.
    """
    if sinks is None:
        return None
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(sinks - lse) * delta, axis=(0, 1)).astype(sinks.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
