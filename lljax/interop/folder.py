"""A base model in a folder: config.json, safetensors and a tokenizer."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.base import Base
from lljax.interop.tokenizer import open_tokenizer
from lljax.interop.tokenizer_bounds import check
from lljax.models.families import FAMILIES
from lljax.models.quantize import Form, Quantized


class FolderBase(Base):
    """A base in a folder with config.json, safetensors and a tokenizer."""

    folder: Path

    def __init__(self, path: str, folder: Path):
        self.path, self.folder = path, folder
        self.config, self.prefix = text_model(read_json(folder / "config.json"))
        self._tensors: safetensors.Folder | None = None

    @property
    def location(self) -> Path:
        return self.folder

    @property
    def tensors(self) -> safetensors.Folder:
        if self._tensors is None:  # opened late: a random initialization needs none
            self._tensors = safetensors.Folder(self.folder)
        return self._tensors

    def names(self) -> list[str]:
        return [
            name.removeprefix(self.prefix)
            for name in self.tensors.names()
            if name.startswith(self.prefix)
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.prefix + name)

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.dtype(self.prefix + name)

    def read(self, name: str) -> np.ndarray:
        return self.tensors.read(self.prefix + name)

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


def text_model(config: dict) -> tuple[dict[str, Any], str]:
    """The config.json of the text model alone, and the prefix of its tensors.

    They differ from the whole for a multimodal model (`Family.multimodal_parent`).

    Raises:
      ModelError: such a model has no text_config.
    """
    for family in FAMILIES.values():
        whole = family.multimodal_parent
        if whole is None or config.get("model_type") != whole.model_type:
            continue
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ModelError(
                f"config.json: model_type {whole.model_type!r} needs an object text_config, which "
                "describes its text model"
            )
        shared = {
            name: config[name]
            for name in ("dtype", "torch_dtype", "quantization_config")
            if name in config
        }
        architectures = {"architectures": [family.architecture]}
        return {"model_type": family.model_type} | text | shared | architectures, whole.prefix
    return config, ""


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
