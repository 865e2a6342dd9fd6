"""The tensors of one quantized kernel, and the interface of the formats that read them."""

import math
from typing import NoReturn, Protocol

import ml_dtypes
import numpy as np

from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.models.quantize import Form, Quantized

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
Shape = tuple[int, ...]


class Kernel:
    """The tensors on disk of one quantized kernel, in the folder of the base `path`.

    Their names are `stem` and a part, such as ".weight.absmax".
    """

    def __init__(self, path: str, stem: str, tensors: safetensors.Folder):
        self.path, self.stem, self.tensors = path, stem, tensors

    def has(self, part: str) -> bool:
        return self.stem + part in self.tensors.where

    def shape(self, part: str) -> Shape:
        self._require(part)
        return self.tensors.shape(self.stem + part)

    def matrix_shape(self, part: str) -> tuple[int, int]:
        shape = self.shape(part)
        if len(shape) != 2:
            self.refuse(f"{part[1:]} has shape {list(shape)} and should be a matrix")
        return shape[0], shape[1]

    def read(self, part: str, shape: Shape, *types: type) -> np.ndarray:
        """The tensor in this shape (any with as many values is read) and one of these types."""
        self._require(part)
        name = self.stem + part
        stored, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        if math.prod(stored) != math.prod(shape) or dtype not in types:
            raise ModelError(
                f"{self.path}: tensor {name!r} is {dtype} {list(stored)}, and its kernel needs "
                f"{' or '.join(str(np.dtype(t)) for t in types)} {list(shape)}"
            )
        return self.tensors.read(name).reshape(shape)

    def _require(self, part: str) -> None:
        if not self.has(part):
            raise ModelError(f"{self.path}: tensor {self.stem + part!r} is missing")

    def refuse(self, reason: str) -> NoReturn:
        raise ModelError(f"{self.path}: {self.stem}: {reason}")


class Layout(Protocol):
    """A format, made from config.json's quantization_config.

    end: the end of a kernel's HF name, after its stem. marks: parts that only quantized kernels
    have. parts: all parts of a kernel. form: the form that holds such a kernel unchanged; None if
    there is none.
    """

    end: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    form: Form | None

    def shape(self, kernel: Kernel) -> Shape:
        """The shape of the dense kernel, in HF orientation."""
        ...

    def dense(self, kernel: Kernel) -> np.ndarray:
        """The values of the kernel, in HF orientation."""
        ...

    def stored(self, kernel: Kernel, form: Form) -> Quantized | None:
        """The kernel as it is stored; None if it is not in that form."""
        ...
