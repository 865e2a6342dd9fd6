"""Adapters whose first values come from the base (PiSSA, LoftQ; lljax.models.adapter_init)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.errors import ModelError
from lljax.interop.base import Base, BaseView
from lljax.interop.huggingface import hf_names, hf_part
from lljax.models.adapter_init import first_factors
from lljax.models.linear import Linear
from lljax.models.lora import Lora, linear_layers
from lljax.models.lora_layers import TableLora
from lljax.models.quantize import Form, Quantized, dequantize, quantize
from lljax.parallel.sharding import put

Factors = tuple[np.ndarray, np.ndarray]  # A [R, in] and B [out, R]


class FirstValues(NamedTuple):
    """The first values of an adapter, and the factors whose product the kernel goes without."""

    factors: Factors
    subtracted: Factors


def starts_from_base(model: nnx.Module) -> bool:
    """Whether the adapters of a model take their first values from its base, which then keeps the
    rest.
    """
    return any(
        linear.lora is not None and linear.lora.init != "default"
        for _, linear in linear_layers(model)
    )


def owns_kernel(lora: Lora | TableLora | None) -> bool:
    """Whether the kernel below an adapter exists in the run alone: LoftQ's, which it quantized."""
    return lora is not None and lora.init == "loftq"


class ResidualBase(BaseView):
    """The base model of a PiSSA or LoftQ run: its weights minus the initial adapter, W - B A.

    A tensor is computed when it is read, and has the same values every time.

    Raises:
      ModelError: LoftQ starts from dense kernels, and the base has none.
    """

    def __init__(self, base: Base, model: nnx.Module):
        super().__init__(base)
        self._adapted: list[Linear] = [
            linear for _, linear in linear_layers(model) if linear.lora is not None
        ]
        if base.config.get("quantization_config") and any(
            owns_kernel(linear.lora) for linear in self._adapted
        ):
            raise ModelError(
                f"{base.path}: lora.init='loftq' starts from dense kernels, and this base is "
                "quantized: use the model it was made from, or lora.init='default'"
            )
        # By HF name: the layers that the tensor is made of, each with its part of the tensor.
        self._linears: dict[str, list[tuple[Any, Linear]]] = {}
        for linear in self._adapted:
            for name in hf_names(linear.kernel):
                self._linears.setdefault(name, []).append((hf_part(linear.kernel), linear))
        # values of the tensors that were read, by the names of `_linears`
        self._first: dict[str, list[FirstValues]] = {}

    def factors(self, name: str, part: Any = ...) -> Factors:
        """The factors that the run began with, of the adapted kernel that is this part of a
        tensor.
        """
        linear = next(linear for of, linear in self._linears[name] if of == part)
        return self._first_values(name, self._base.read(name)[part], linear).factors

    def _first_values(self, name: str, weight: np.ndarray, linear: Linear) -> FirstValues:
        lora, kernel = _lora(linear), linear.kernel.get_value()
        quantized = functools.partial(_quantized, kernel) if isinstance(kernel, Quantized) else None
        pairs = first_factors(
            weight,
            init=lora.init,
            rank=lora.rank,
            scale=lora.scale,
            seed=lora.seed,
            name=name,
            quantized=quantized,
        )
        return FirstValues(*pairs)

    def read(self, name: str) -> np.ndarray:
        weight = self._base.read(name)
        if name not in self._linears:
            return weight
        if name not in self._first:  # a tensor of several kernels is read for each of them
            self._first[name] = [
                self._first_values(name, weight[part], linear)
                for part, linear in self._linears[name]
            ]
        weight = weight.astype(np.float32)  # a copy
        for (part, linear), first in zip(self._linears[name], self._first[name], strict=True):
            a, b = first.subtracted
            weight[part] -= _lora(linear).scale * (b @ a)
        return weight

    def stored(self, name: str, form: Form) -> Quantized | None:
        """None for a kernel that differs from the base's."""
        return None if name in self._linears else self._base.stored(name, form)

    def give_factors(self, shardings: Callable | None = None) -> None:
        """Fills the factors of the model, whose kernels have been read."""
        for linear in self._adapted:
            lora, names, part = _lora(linear), hf_names(linear.kernel), hf_part(linear.kernel)
            index = [of for of, _ in self._linears[names[0]]].index(part)
            for variable, which in ((lora.a, 0), (lora.b, 1)):
                layers = [self._first[name][index].factors[which].T for name in names]
                value = np.stack(layers).reshape(variable.get_value().shape)
                variable.set_value(put(value, shardings(variable) if shardings else None))


def _lora(linear: Linear) -> Lora:
    assert linear.lora is not None  # it is an adapted layer
    return linear.lora


def _quantized(kernel: Quantized, weight: np.ndarray) -> np.ndarray:
    """The float32 value of a weight [out, in] once it is quantized as `kernel` is."""
    return np.asarray(_there_and_back(weight.T, kernel.form, kernel.dtype)).T


@functools.partial(jax.jit, static_argnums=(1, 2))
def _there_and_back(weight: jax.Array, form: Form, dtype: Any) -> jax.Array:
    return dequantize(quantize(weight.astype(dtype), form, dtype), jnp.float32)
