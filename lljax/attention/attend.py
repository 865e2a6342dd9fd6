"""One operation over a table of implementations."""

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lljax.attention import blockwise, cudnn, direct, gpu, tpu
from lljax.attention.mask import Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.saved import SAVED
from lljax.errors import ConfigError


class UnsupportedAttention(ConfigError):
    """The named implementation cannot serve this mask, these operands or this platform."""


def _serves_all(q: jax.Array, k: jax.Array, mask: Mask, options: AttentionOptions) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Either a forward/backward pair, whose partial results ring attention can merge, or one
    function `whole` that jax differentiates.

    forward(q, k, v, mask, *, scale, softcap) -> (out, lse [B, T, N]).
    backward(q, k, v, mask, results of forward, d_out, *, scale, softcap, dtype) -> (dq, dk, dv).
      Both as in `lljax.attention.blockwise`.
    whole(q, k, v, mask, options) -> out.
    platforms: where it runs; everywhere if empty.
    refuses(q, k, mask, options) -> the reason not to serve, from shapes and dtypes; "" for none.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None
    whole: Callable[..., jax.Array] | None = None
    platforms: tuple[str, ...] = ()
    refuses: Callable[..., str] = _serves_all

    @property
    def pair(self) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
        """(forward, backward) of an implementation without `whole`."""
        assert self.forward is not None and self.backward is not None, "has no forward/backward"
        return self.forward, self.backward


# In order of preference.
IMPLEMENTATIONS = {
    "direct": Implementation(whole=direct.attend, refuses=direct.refuses),
    "tpu": Implementation(tpu.forward, tpu.backward, platforms=("tpu",)),
    "cudnn": Implementation(whole=cudnn.attend, platforms=("gpu",), refuses=cudnn.refuses),
    "triton": Implementation(gpu.forward, gpu.backward, platforms=("gpu",)),
    "blockwise": Implementation(blockwise.forward, blockwise.backward),
}


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    options: AttentionOptions,
) -> Float[Array, "B T N H"]:
    """Attention of q over k and v under `mask`; query head n reads key/value head n // (N / K).

    Raises:
      UnsupportedAttention: the implementation that `options` names cannot serve.
    """
    name = select(q, k, mask, options)
    whole = IMPLEMENTATIONS[name].whole
    if whole is not None:
        return whole(q, k, v, mask, options)
    # Sinks are traced, so they are an operand; the rest of the options is static (nondiff_argnums).
    static = options.replace(implementation=name, sinks=None)
    # custom_vjp has no type for its result
    return cast(jax.Array, _attend(static, q, k, v, mask, options.sinks))


def select(q: jax.Array, k: jax.Array, mask: Mask, options: AttentionOptions) -> str:
    """The implementation that `options` names, or the first of the table that can serve.

    Raises:
      UnsupportedAttention: the named one cannot serve.
    """
    if options.implementation != "auto":
        _refuse(options.implementation, refusal(q, k, mask, options))
        return options.implementation
    return next(
        name
        for name in IMPLEMENTATIONS
        if not refusal(q, k, mask, options.replace(implementation=name))
    )


def refusal(q: jax.Array, k: jax.Array, mask: Mask, options: AttentionOptions) -> str:
    """Why the named implementation cannot serve this platform, mask and operands; "" if it can."""
    platform = options.platform or jax.default_backend()
    if reason := _platform_refusal(options.implementation, platform):
        return reason
    return IMPLEMENTATIONS[options.implementation].refuses(q, k, mask, options)


def check_platform(name: str, platform: str) -> None:
    """Refuses an implementation that does not run on `platform` (cpu | gpu | tpu).

    name: "auto" or a key of `IMPLEMENTATIONS`.

    Raises:
      UnsupportedAttention: it does not run there, or does not exist.
    """
    if name != "auto":
        _refuse(name, _platform_refusal(name, platform))


def _platform_refusal(name: str, platform: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise UnsupportedAttention(
            f"context.implementation={name!r} is none of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    platforms = IMPLEMENTATIONS[name].platforms
    if not platforms or platform in platforms:
        return ""
    return f"devices of platform {platform}, only {' and '.join(platforms)}"


def _refuse(name: str, reason: str) -> None:
    if reason:
        raise UnsupportedAttention(
            f"context.implementation={name!r} cannot serve {reason}: use 'auto', which takes the "
            "first that can"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: AttentionOptions, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks
) -> jax.Array:
    return _attend_forward(options, q, k, v, mask, sinks)[0]


def _attend_forward(
    options: AttentionOptions, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks
):
    forward, _ = IMPLEMENTATIONS[options.implementation].pair
    out, lse = forward(q, k, v, mask, scale=options.scale, softcap=options.softcap)
    if sinks is not None:  # one more key, merged as a ring merges the keys of another device
        total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
        out, lse = (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED, strict=True))
    return out, (q, k, v, mask, sinks, out, lse)


def _attend_backward(options: AttentionOptions, saved, d_out: jax.Array):
    q, k, v, mask, sinks, out, lse = saved
    _, backward = IMPLEMENTATIONS[options.implementation].pair
    gradients = backward(
        *(q, k, v, mask, (out, lse), d_out),
        scale=options.scale,
        softcap=options.softcap,
        dtype=q.dtype,
    )
    return *gradients, None, sink_gradient(sinks, out, lse, d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def sink_gradient(
    sinks: Float[Array, " N"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
) -> Float[Array, " N"] | None:
    """The gradient of the sinks, given the results of attention with them: a sink is a key whose
    value is zero. None without sinks.
    """
    if sinks is None:
        return None
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(sinks - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
