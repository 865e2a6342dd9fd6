"""A base whose kernels are quantized on disk, in one of the formats of lljax.interop.layouts."""

from typing import Any

import numpy as np

from lljax.errors import ModelError
from lljax.interop.base import config_dtype
from lljax.interop.folder import FolderBase, crc32
from lljax.interop.layouts import Kernel, layout_of
from lljax.models.quantize import Form, Quantized


class QuantizedFolder(FolderBase):
    """A folder with quantized kernels.

    It shows them dense, under the names of the dense model; `stored` returns a kernel unchanged, in
    the form that a run with the same `model.quantize` holds.
    """

    def __init__(self, path: str, folder: Any):
        super().__init__(path, folder)
        layout = layout_of(self.config)
        if layout is None:
            raise ModelError(f"{path}: config.json has no quantization_config")
        self._layout = layout
        self._stems: dict[str, str] | None = None

    @property
    def stems(self) -> dict[str, str]:
        """{HF name of a quantized kernel: the stem of the names of its tensors on disk}."""
        if self._stems is None:
            marks = tuple(self._layout.marks)
            stems = {
                name.removesuffix(mark)
                for name in super().names()
                for mark in marks
                if name.endswith(mark)
            }
            self._stems = {stem + self._layout.end: stem for stem in sorted(stems)}
        return self._stems

    def names(self) -> list[str]:
        parts = {stem + part for stem in self.stems.values() for part in self._layout.parts}
        return [*(name for name in super().names() if name not in parts), *self.stems]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layout.shape(self._kernel(name)) if name in self.stems else super().shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a quantized kernel before it was quantized, which an export writes."""
        if name not in self.stems:
            return super().dtype(name)
        return config_dtype(self.config)

    def read(self, name: str) -> np.ndarray:
        """A quantized kernel in a type in which every product is exact or rounded once."""
        return self._layout.dense(self._kernel(name)) if name in self.stems else super().read(name)

    def stored(self, name: str, form: Form) -> Quantized | None:
        return self._layout.stored(self._kernel(name), form) if name in self.stems else None

    def checksum(self, name: str, before: int = 0) -> int:
        if name not in self.stems:
            return super().checksum(name, before)
        stem = self.on_disk(self.stems[name])
        for part in self._layout.parts:
            if stem + part in self.tensors.where:
                before = crc32(self.tensors.read(stem + part), before)
        return before

    def _kernel(self, name: str) -> Kernel:
        return Kernel(self.path, self.on_disk(self.stems[name]), self.tensors)
