"""A base as a run sees it whose factors start from it (lljax.models.adapter_init): without what the
factors hold at the start.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.errors import ModelError
from lljax.interop.huggingface import hf_names, hf_part
from lljax.models.adapter_init import first_factors
from lljax.models.lora import linear_layers
from lljax.models.quantize import Quantised, dequantise, quantise
from lljax.parallel.sharding import put


def starts_from_base(model: nnx.Module) -> bool:
    """Whether the factors of a model take their first values from its base, which then keeps the
    rest.
    """
    return any(
        linear.lora is not None and linear.lora.init != "default"
        for _, linear in linear_layers(model)
    )


def owns_kernel(lora) -> bool:
    """Whether the kernel below an adapter is to be found in the run alone: LoftQ's is what was
    quantised.
    """
    return lora is not None and lora.init == "loftq"


class StartedBase:
    """`base` with the kernels that the run of `model` keeps frozen. Everything is computed where it
    is asked for, one tensor at a time, and is the same every time.

    Raises:
      ModelError: LoftQ starts from the dense kernels, and the base has none.
    """

    def __init__(self, base, model: nnx.Module):
        self._base = base
        self._adapted = [linear for _, linear in linear_layers(model) if linear.lora is not None]
        if base.config.get("quantization_config") and any(
            owns_kernel(linear.lora) for linear in self._adapted
        ):
            raise ModelError(
                f"{base.path}: lora.init='loftq' starts from dense kernels, and this base is quantised: use the "
                "model it was made from, or lora.init='default'"
            )
        self._linears = {}  # HF name -> [(which part of it, the layer)]
        for linear in self._adapted:
            for name in hf_names(linear.kernel):
                self._linears.setdefault(name, []).append((hf_part(linear.kernel), linear))
        # of the tensors that were read, see lljax.models.adapter_init.first_factors
        self._read = {}

    def __getattr__(self, attribute):
        return getattr(self._base, attribute)

    def factors(self, name: str, part=...):
        """A [R, in] and B [out, R] that the run began with, of the adapted kernel that is this part
        of a tensor.
        """
        linear = next(linear for of, linear in self._linears[name] if of == part)
        return self._factors(name, self._base.read(name)[part], linear)[0]

    def _factors(self, name, weight, linear):
        lora, kernel = linear.lora, linear.kernel.get_value()
        quantised = functools.partial(_quantised, kernel) if isinstance(kernel, Quantised) else None
        return first_factors(
            weight,
            init=lora.init,
            rank=lora.rank,
            scale=lora.scale,
            seed=lora.seed,
            name=name,
            quantised=quantised,
        )

    def read(self, name: str) -> np.ndarray:
        weight = self._base.read(name)
        if name not in self._linears:
            return weight
        if name not in self._read:  # a tensor of several kernels is read for each of them
            self._read[name] = [
                self._factors(name, weight[part], linear) for part, linear in self._linears[name]
            ]
        weight = weight.astype(np.float32)  # a copy
        for (part, linear), (_, (a, b)) in zip(self._linears[name], self._read[name]):
            weight[part] -= linear.lora.scale * (b @ a)
        return weight

    def stored(self, name: str, form):
        """Codes of the base are not those of what a kernel keeps."""
        return None if name in self._linears else self._base.stored(name, form)

    def give_factors(self, shardings=None) -> None:
        """Fills the factors of the model, whose kernels have been read."""
        for linear in self._adapted:
            lora, names, part = linear.lora, hf_names(linear.kernel), hf_part(linear.kernel)
            place = [of for of, _ in self._linears[names[0]]].index(part)
            for variable, which in ((lora.a, 0), (lora.b, 1)):
                value = np.stack([self._read[name][place][0][which].T for name in names]).reshape(
                    variable.get_value().shape
                )
                variable.set_value(put(value, shardings(variable) if shardings else None))


def _quantised(kernel: Quantised, weight: np.ndarray) -> np.ndarray:
    """The float32 value of a weight [out, in] once it is quantised as `kernel` is."""
    return np.asarray(_there_and_back(weight.T, kernel.form, kernel.dtype)).T


@functools.partial(jax.jit, static_argnums=(1, 2))
def _there_and_back(weight, form, dtype):
    return dequantise(quantise(weight.astype(dtype), form, dtype), jnp.float32)
