"""A base whose checkpoint keeps the experts of a layer in two tensors, as its family has them: a
tensor for each.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from lljax.interop.base import BaseView
from lljax.interop.folder import crc32

FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class SplitExperts(BaseView):
    """Shows gate_up_proj [E, 2F, D] and down_proj [E, D, F] of every layer as gate_proj and up_proj
    [F, D] and down_proj [D, F] of every expert. Matrices may be transposed on disk, as they are on
    the hub, and transformers 5 saves them as they are here. A checkpoint with a tensor for each
    expert stays as it is.
    """

    def names(self) -> list[str]:
        fused = [name for name in self._base.names() if FUSED.fullmatch(name)]
        names = [name for name in self._base.names() if not FUSED.fullmatch(name)]
        for name in fused:
            block, _, projection = name.rpartition(".")
            experts = range(self._base.shape(name)[0])
            names += [f"{block}.{e}.{part}.weight" for e in experts for part in PARTS[projection]]
        return names

    def fused(self, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray | None:
        """A tensor of all experts, as it is on disk, from those that `read` returns of every one;
        None if `name` is no such tensor.
        """
        found = FUSED.fullmatch(name)
        if not found:
            return None
        block, projection = found.groups()
        experts = [
            np.concatenate([read(f"{block}.{e}.{part}.weight") for part in PARTS[projection]])
            for e in range(self._base.shape(name)[0])
        ]
        fused = np.stack(experts)
        return np.ascontiguousarray(fused.swapaxes(1, 2)) if self._is_turned(block) else fused

    def shape(self, name: str) -> tuple[int, ...]:
        return self.read(name).shape if self._found(name) else self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self.read(name).dtype if self._found(name) else self._base.dtype(name)

    def read(self, name: str) -> np.ndarray:
        found = self._found(name)
        if not found:
            return self._base.read(name)
        block, expert, part = found.groups()
        down = part == "down_proj"
        fused = self._base.read(f"{block}.{'down_proj' if down else 'gate_up_proj'}")[int(expert)]
        if self._is_turned(block):
            fused = fused.T
        if down:
            return fused
        F = len(fused) // 2
        return fused[:F] if part == "gate_proj" else fused[F:]

    def _found(self, name: str) -> re.Match | None:
        """The parts of the name of an expert's matrix that is in a tensor of all experts."""
        found = EXPERT.fullmatch(name)
        return found if found and f"{found[1]}.down_proj" in self._stored else None

    @functools.cached_property
    def _stored(self) -> set[str]:
        return set(self._base.names())

    def _is_turned(self, block: str) -> bool:
        """Whether matrices are transposed on disk; either tensor alone may have square ones."""
        D, shape = self.config["hidden_size"], self._base.shape
        return shape(f"{block}.down_proj")[1] != D or shape(f"{block}.gate_up_proj")[2] != D

    def checksum(self, name: str, before: int = 0) -> int:
        if self._found(name):
            return crc32(self.read(name), before)
        return self._base.checksum(name, before)
