"""A base whose checkpoint keeps the experts of a layer in two tensors, as its family has them: a
tensor for each.
"""

import re

import numpy as np

from lljax.interop.base import BaseView
from lljax.interop.folder import crc32

FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class SplitExperts(BaseView):
    """Shows gate_up_proj [E, 2F, D] and down_proj [E, D, F] of every layer as gate_proj and up_proj
    [F, D] and down_proj [D, F] of every expert. Matrices may be transposed on disk, as they are on
    the hub, and transformers 5 saves them as they are here.
    """

    def names(self) -> list[str]:
        fused = [name for name in self._base.names() if FUSED.fullmatch(name)]
        names = [name for name in self._base.names() if not FUSED.fullmatch(name)]
        for name in fused:
            block, _, projection = name.rpartition(".")
            parts = ("down_proj",) if projection == "down_proj" else ("gate_proj", "up_proj")
            experts = range(self._base.shape(name)[0])
            names += [f"{block}.{e}.{part}.weight" for e in experts for part in parts]
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.read(name).shape if EXPERT.fullmatch(name) else self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self.read(name).dtype if EXPERT.fullmatch(name) else self._base.dtype(name)

    def read(self, name: str) -> np.ndarray:
        found = EXPERT.fullmatch(name)
        if not found:
            return self._base.read(name)
        block, expert, part = found.groups()
        down, D = part == "down_proj", self.config["hidden_size"]
        fused = self._base.read(f"{block}.{'down_proj' if down else 'gate_up_proj'}")[int(expert)]
        inner, outer = (f"{block}.{name}" for name in ("down_proj", "gate_up_proj"))
        # Either alone is square in some models.
        if self._base.shape(inner)[1] != D or self._base.shape(outer)[2] != D:
            fused = fused.T
        if down:
            return fused
        F = len(fused) // 2
        return fused[:F] if part == "gate_proj" else fused[F:]

    def checksum(self, name: str, before: int = 0) -> int:
        if EXPERT.fullmatch(name):
            return crc32(self.read(name), before)
        return self._base.checksum(name, before)
