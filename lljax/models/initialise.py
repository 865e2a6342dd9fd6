"""Random values for whatever a model holds no values for yet."""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.models import lora
from lljax.models.declare import declared, dtype_of
from lljax.models.quantize import Quantised, quantise


def initialise(
    model: nnx.Module, seed: int, *, deviation: float = 0.02, dtype=jnp.float32, shardings=None
) -> None:
    """Fills every abstract Variable of `model` by its declared `init`; Variables that hold values
    stay.

    A value depends on the seed and the Variable's name alone. Trainable ones are float32, the
    others `dtype`. `shardings(variable)`, where given, is where the value goes.
    """
    for _, variable in declared(model):
        shape = variable.get_value()
        if (
            not isinstance(jax.tree.leaves(shape)[0], jax.ShapeDtypeStruct)
            or variable.get_metadata("init") == "norms"
        ):
            continue
        form, wanted = (
            (shape.form, shape.dtype)
            if isinstance(shape, Quantised)
            else (None, dtype_of(variable, dtype))
        )
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
    """Its HF name, from which layer on it holds a stack, and from which row on it is part: a name
    of which there is one.
    """
    (layer, *_), (row, *_) = (
        variable.get_metadata().get(name, (0,)) for name in ("layers", "part")
    )
    return (
        variable.get_metadata("hf")
        + (f" from {layer}" if layer else "")
        + (f" row {row}" if row else "")
    )


def _draw(key, init, shape, deviation, form, dtype):
    """At the top of the module, so that what was compiled for one Variable serves the next of its
    shape.
    """
    x = INITS[init](key, shape, deviation)
    return quantise(x, form, dtype) if form else x.astype(dtype)


def _he_uniform(key, shape, deviation):
    bound = 1 / math.sqrt(shape[-2])  # torch's kaiming_uniform_(a=sqrt(5)), which PEFT uses for A
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


INITS = {
    "normal": lambda key, shape, deviation: deviation * jax.random.normal(key, shape),
    "unit_normal": lambda key, shape, deviation: jax.random.normal(key, shape),
    "zeros": lambda key, shape, deviation: jnp.zeros(shape),
    "ones": lambda key, shape, deviation: jnp.ones(shape),
    "he_uniform": _he_uniform,
}
