"""Products with frozen kernels in eight bits (e4m3), for chips that multiply them at twice the
speed of bfloat16.

Each row of the left side and each column of the right side is divided by its scale, so that its
largest value is 448, the largest of e4m3; sums are float32. Micikevicius et al. 2022, arXiv
2209.05433. Gradients are e4m3 too, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), whose
scales are finer.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.errors import ConfigError
from lljax.hardware import chips as devices

LARGEST = 448.0


def check(kinds: Iterable[str]) -> None:
    """kinds: JAX's names of the devices.

    Raises:
      ConfigError: a device has no products of eight bits.
    """
    for kind in sorted(set(kinds)):
        device = devices.of_kind(kind)
        if device is not None and not device.fp8:
            raise ConfigError(
                f"model.matmul='fp8': {kind} does not multiply in eight bits and would be slower "
                "for it: use model.matmul='default'"
            )


@jax.custom_vjp
def fp8_dot(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x @ kernel, in the dtype of x. The kernel is frozen: it gets no gradient."""
    return _dot(x, kernel, contracted=0)


def _dot(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
    """x times the kernel (contracted=0), or its transpose (1)."""
    x8, x_scale = _to_e4m3(x, -1)
    kernel8, kernel_scale = _to_e4m3(kernel, contracted)
    y = jax.lax.dot_general(
        x8, kernel8, (((x.ndim - 1,), (contracted,)), ((), ())), preferred_element_type=x.dtype
    )
    return (y * x_scale * kernel_scale.reshape(-1)).astype(x.dtype)


def _to_e4m3(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """x divided by its float32 scales along `axis`, and the scales."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / LARGEST
    scale = jnp.where(scale == 0, 1.0, scale)
    return (wide / scale).astype(jnp.float8_e4m3fn), scale


def _forward(x, kernel):
    return fp8_dot(x, kernel), kernel


def _backward(kernel, dy):
    return _dot(dy, kernel, contracted=1), None


fp8_dot.defvjp(_forward, _backward)
