"""A base model in a folder: config.json, safetensors and a tokenizer."""

import hashlib
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.base import Base
from lljax.interop.multimodal import names_on_disk, text_model
from lljax.interop.tokenizer import open_tokenizer
from lljax.interop.tokenizer_bounds import check
from lljax.models.families.family import MultimodalModel, Names
from lljax.models.quantize import Form, Quantized


class FolderBase(Base):
    """A base in a folder with config.json, safetensors and a tokenizer."""

    folder: Path

    def __init__(self, path: str, folder: Path):
        self.path, self.folder = path, folder
        self.config, self.whole = text_model(read_json(folder / "config.json"))
        self._tensors: safetensors.Folder | None = None
        self._names: Names | None = None

    @property
    def location(self) -> Path:
        return self.folder

    @property
    def tensors(self) -> safetensors.Folder:
        if self._tensors is None:  # opened late: a random initialization needs none
            self._tensors = safetensors.Folder(self.folder)
        return self._tensors

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor, or of the stem of its names."""
        if self.whole is None:
            return name
        if self._names is None:
            self._names = self._names_on_disk(self.whole.model)
        return self._names.of(name)

    def _names_on_disk(self, whole: MultimodalModel) -> Names:
        """How a multimodal checkpoint names its text model. Logs how much else it holds."""
        stored = self.tensors.names()
        names = names_on_disk(whole, stored)
        logging.warning(
            "%s: the text model of this %s is read; %d tensors of other parts, such as its vision "
            "model, are not",
            self.path,
            whole.model_type,
            sum(names.text(name) is None for name in stored),
        )
        return names

    def names(self) -> list[str]:
        if self.whole is None:
            return self.tensors.names()
        self.on_disk("model")  # finds the names
        assert self._names is not None
        texts = map(self._names.text, self.tensors.names())
        return [name for name in texts if name is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.on_disk(name))

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.dtype(self.on_disk(name))

    def read(self, name: str) -> np.ndarray:
        return self.tensors.read(self.on_disk(name))

    def stored(self, name: str, form: Form) -> Quantized | None:
        return None

    def checksum(self, name: str, before: int = 0) -> int:
        return crc32(self.read(name), before)

    @property
    def generation_config(self) -> dict[str, Any] | None:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def tokenizer(self) -> Any:
        file, end = self.folder / "tokenizer_config.json", self.config.get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        tokenizer = open_tokenizer(
            self.path,
            self.folder,
            read_json(file) if file.is_file() else {},
            end if isinstance(end, int) else None,
        )
        check(self.path, tokenizer)
        return tokenizer

    def fingerprint(self) -> str:
        """sha256 over config.json and the headers and sizes of the weight files; the weights are
        not read.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if (self.folder / "model.safetensors").exists() or (
            self.folder / safetensors.INDEX
        ).exists():
            for file in self.tensors.files:
                with open(file.path, "rb") as opened:
                    digest.update(
                        opened.read(file.header_bytes) + str(file.path.stat().st_size).encode()
                    )
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ModelError: the file is missing or holds no JSON object.
    """
    if not path.is_file():  # nor a pipe or a device, which would be read without end
        raise ModelError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def crc32(array: np.ndarray, before: int = 0) -> int:
    """crc32 of an array's bytes, after the bytes whose crc32 is `before`.

    About 2 GiB a second on one core.
    """
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)
