"""The interface of a base model, whatever it is stored in."""

from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lljax.interop.multimodal import Whole
from lljax.models.quantize import Form, Quantized


def config_dtype(config: dict[str, Any]) -> np.dtype:
    """The dtype of weights that a config.json names; bfloat16 if it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return np.dtype(getattr(ml_dtypes, name, name))


class Base(Protocol):
    """A base model. Tensors have their HF names and orientation.

    path: its name as the user gave it. folder: the folder of its files; None for a GGUF file.
    whole: the multimodal model that it is the text model of; None for a text model. config: HF
    config.json of the text model. generation_config: generation_config.json, such as the tokens
    that end a turn.
    """

    path: str
    folder: Path | None
    whole: Whole | None
    config: dict[str, Any]

    @property
    def generation_config(self) -> dict[str, Any] | None: ...

    @property
    def location(self) -> Path:
        """Its folder, or its file."""
        ...

    @property
    def adapted(self) -> Whole | None:
        """The multimodal model that adapters of this base belong on; None for the text model."""
        return None if self.whole is None or self.whole.model.text_adapters else self.whole

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...

    def stored(self, name: str, form: Form) -> Quantized | None:
        """A kernel as it is stored; None if it is not quantized in that form."""
        ...

    def checksum(self, name: str, before: int = 0) -> int:
        """crc32 of a tensor's bytes on disk, after the bytes whose crc32 is `before`."""
        ...

    def tokenizer(self) -> Any:
        """A fast tokenizer of transformers."""
        ...

    def fingerprint(self) -> str:
        """Identifies the base without reading its weights."""
        ...


class BaseView(Base):
    """A base that is `base` except for the methods that a subclass overrides."""

    def __init__(self, base: Base):
        self._base = base
        self.path, self.folder, self.whole = base.path, base.folder, base.whole
        self.config = base.config

    @property
    def generation_config(self) -> dict[str, Any] | None:
        return self._base.generation_config

    @property
    def location(self) -> Path:
        return self._base.location

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._base.read(name)

    def stored(self, name: str, form: Form) -> Quantized | None:
        return self._base.stored(name, form)

    def checksum(self, name: str, before: int = 0) -> int:
        return self._base.checksum(name, before)

    def tokenizer(self) -> Any:
        return self._base.tokenizer()

    def fingerprint(self) -> str:
        return self._base.fingerprint()
