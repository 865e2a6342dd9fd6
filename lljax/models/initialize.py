"""Random values for the Variables of a model that have none yet."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.models import lora
from lljax.models.declare import declared, dtype_of
from lljax.models.quantize import Form, Quantized, quantize


def initialize(
    model: nnx.Module,
    seed: int,
    *,
    deviation: float = 0.02,
    dtype: Any = jnp.float32,
    shardings: Callable[[nnx.Variable], Any] | None = None,
) -> None:
    """Fills every abstract Variable of `model` by its declared `init`; Variables with values stay.

    A value depends only on the seed and the name of the Variable. Trainable values are float32, all
    others `dtype`. shardings: gives the sharding of a Variable's value; None for the default
    device. deviation: standard deviation of "normal".
    """
    for _, variable in declared(model):
        shape = variable.get_value()
        if (
            not isinstance(jax.tree.leaves(shape)[0], jax.ShapeDtypeStruct)
            or variable.get_metadata("init") == "norms"
        ):
            continue
        form, wanted = None, dtype_of(variable, dtype)
        if isinstance(shape, Quantized):
            form, wanted = shape.form, shape.dtype
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(_name(variable).encode()))
        draw = jax.jit(
            _draw,
            static_argnums=(1, 2, 3, 4, 5),
            out_shardings=shardings(variable) if shardings else None,
        )
        variable.set_value(
            draw(key, variable.get_metadata("init"), shape.shape, deviation, form, wanted)
        )
    lora.start_magnitudes(model, shardings=shardings)


def _name(variable: nnx.Variable) -> str:
    """A unique name: its HF name, with the first layer of its stack and the first row of its
    part.
    """
    metadata = variable.get_metadata()
    (layer, *_), (row, *_) = metadata.get("layers", (0,)), metadata.get("part", (0,))
    return metadata["hf"] + (f" from {layer}" if layer else "") + (f" row {row}" if row else "")


def _draw(
    key: jax.Array,
    init: str,
    shape: tuple[int, ...],
    deviation: float,
    form: Form | None,
    dtype: Any,
):
    """At module level, so that Variables of the same shape share a compilation."""
    x = INITS[init](key, shape, deviation)
    return quantize(x, form, dtype) if form else x.astype(dtype)


def _he_uniform(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    bound = 1 / math.sqrt(shape[-2])  # torch's kaiming_uniform_(a=sqrt(5)), which PEFT uses for A
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


INITS: dict[str, Callable[[jax.Array, tuple[int, ...], float], jax.Array]] = {
    "normal": lambda key, shape, deviation: deviation * jax.random.normal(key, shape),
    "unit_normal": lambda key, shape, deviation: jax.random.normal(key, shape),
    "zeros": lambda key, shape, deviation: jnp.zeros(shape),
    "ones": lambda key, shape, deviation: jnp.ones(shape),
    "he_uniform": _he_uniform,
}
