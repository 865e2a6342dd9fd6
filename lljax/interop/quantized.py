"""Bases that are quantised on disk: bitsandbytes NF4, GPTQ, AWQ, compressed-tensors, FP8 in blocks
as DeepSeek's, and MXFP4.

`QuantisedFolder` shows their kernels dense, under the names that the dense model has; `stored`
gives one as it is, in the form that a run with the same `model.quantize` holds it. A layout is a
class that reads the tensors of one kernel.
"""

import ml_dtypes
import numpy as np

from lljax.interop.folder import FolderBase, crc32
from lljax.interop.layouts import Kernel, layout_of


class QuantisedFolder(FolderBase):
    """The interface of FolderBase over a folder whose kernels are quantised."""

    def __init__(self, path, folder):
        super().__init__(path, folder)
        self._layout, self._stems = layout_of(self.config), None

    @property
    def stems(self) -> dict[str, str]:
        """{HF name of a kernel: what the names of its tensors on disk begin with} of those that are
        quantised.
        """
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
        own = {stem + part for stem in self.stems.values() for part in self._layout.parts}
        return [*(name for name in super().names() if name not in own), *self.stems]

    def shape(self, name):
        return self._layout.shape(self._of(name)) if name in self.stems else super().shape(name)

    def dtype(self, name):
        """Of a quantised kernel what it was made from, and what an export writes."""
        if name not in self.stems:
            return super().dtype(name)
        named = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return np.dtype(getattr(ml_dtypes, named, named))

    def read(self, name):
        """A quantised kernel in a type in which every product is exact or rounded once."""
        return self._layout.dense(self._of(name)) if name in self.stems else super().read(name)

    def stored(self, name, form):
        if name not in self.stems:
            return None
        return self._layout.stored(self._of(name), form)

    def checksum(self, name, before=0):
        if name not in self.stems:
            return super().checksum(name, before)
        stem = self.prefix + self.stems[name]
        for part in self._layout.parts:
            if stem + part in self.tensors.where:
                before = crc32(self.tensors.read(stem + part), before)
        return before

    def _of(self, name) -> "Kernel":
        return Kernel(self, self.stems[name])
