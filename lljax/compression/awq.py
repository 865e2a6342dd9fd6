"""AWQ: the scales of inputs that make rounding to nearest lose least.

Lin et al. 2023, arXiv 2306.00978, section 3.2, with the scales of AutoAWQ ("duo scaling"). The
inputs of kernels W are divided by s, which folds into the norm or the linear layer before them, and
their weights multiplied by s.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lljax.compression.rounding import Stored, round_to_nearest
from lljax.interop.layouts import Scheme

RATIOS = np.arange(20, dtype=np.float32) / 20  # exponents that are tried


@functools.partial(jax.jit, static_argnames=("scheme", "stored", "search"))
def best_scales(
    kernels: Sequence[Float[Array, "I O"]],
    gram: Float[Array, "I I"],
    size: Float[Array, " I"],
    *,
    scheme: Scheme,
    stored: Stored,
    search: bool,
) -> Float[Array, " I"]:
    """The scale of each input of `kernels`, which share their inputs: of 20 exponents, the one with
    the least error |X (W' - W)|^2, from gram = X^T X.

    size: the sum of |x| of each input; a common factor makes no difference.
    """
    kernels = [kernel.astype(jnp.float32) for kernel in kernels]
    size = size / jnp.maximum(jnp.mean(size), 1e-30)
    weight_size = _mean_share(jnp.concatenate(kernels, axis=1), scheme)

    def scales(ratio):
        s = jnp.maximum(size**ratio / (weight_size ** (1 - ratio) + 1e-4), 1e-4)
        s = s / jnp.sqrt(jnp.max(s) * jnp.min(s))
        # an input that is always 0 keeps its weights
        return jnp.where((size > 0) & jnp.isfinite(s), s, 1.0)

    def error(s):
        total = jnp.float32(0)
        for kernel in kernels:
            rounded = round_to_nearest(
                kernel * s[:, None], scheme=scheme, stored=stored, search=search
            )
            change = rounded.dense(scheme) / s[:, None] - kernel
            total += jnp.sum(change * jnp.matmul(gram, change, precision="highest"))
        return total

    def better(best, ratio):
        least, found = best
        tried = scales(ratio)
        now = error(tried)
        return (jnp.minimum(now, least), jnp.where(now < least, tried, found)), None

    ones = jnp.ones_like(size)
    # No scale at all is tried too, so that AWQ is never worse than rounding on these inputs.
    return jax.lax.scan(better, (error(ones), ones), jnp.asarray(RATIOS))[0][1]


def _mean_share(kernel: Float[Array, "I O"], scheme: Scheme) -> Float[Array, " I"]:
    """The mean over outputs of each weight's share of the largest of its group; AutoAWQ
    `_search_best_scale`.
    """
    inputs, outputs = kernel.shape
    group = inputs if scheme.group == -1 else scheme.group
    grouped = jnp.abs(kernel).reshape(-1, group, outputs)
    shares = grouped / (jnp.max(grouped, axis=1, keepdims=True) + 1e-6)
    return jnp.mean(shares.reshape(inputs, outputs), axis=1)
