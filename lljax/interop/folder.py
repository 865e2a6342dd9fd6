"""A base model in a folder: config.json, safetensors and a tokenizer."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.tokenizer_bounds import check

# By model_type, of models that read more than text: the prefix of the tensors of their text model,
# and its architecture.
TEXT_MODELS = {"llama4": ("language_model.", "Llama4ForCausalLM")}


class FolderBase:
    """A folder with config.json, safetensors and a tokenizer. The interface of every base:

    path: what the user named. config: HF config.json as a dict; where the folder holds more than a
      text model, that of the text model, and `prefix` is what the names of its tensors begin with
      there. names(), shape(name), read(name): tensors under their HF names and in HF orientation.
      stored(name, form): a kernel as it is stored, where it is quantised in that form. tokenizer():
      a transformers fast tokenizer. folder: of its files; None for a GGUF file. checksum(name,
      before): crc32 of what is on disk of a tensor. fingerprint(): tells bases apart without
      reading their weights.
    """

    def __init__(self, path: str, folder: Path):
        self.path, self.folder = path, folder
        self.config, self.prefix = text_model(read_json(folder / "config.json"))
        self._tensors = None

    @property
    def tensors(self) -> safetensors.Folder:
        if self._tensors is None:  # opened late: a random initialisation needs none
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

    def stored(self, name: str, form):
        return None

    def checksum(self, name: str, before: int = 0) -> int:
        return crc32(self.read(name), before)

    @property
    def generation_config(self) -> dict | None:
        """What generation_config.json says, such as the tokens that end a turn."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else None

    def tokenizer(self):
        from lljax.interop.tokenizer import open_tokenizer

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


def text_model(config: dict) -> tuple[dict, str]:
    """The config.json of the text model alone, and the prefix of its tensors: see TEXT_MODELS.

    Raises:
      ModelError: a model of several kinds of input without a text_config.
    """
    if config.get("model_type") not in TEXT_MODELS:
        return config, ""
    prefix, architecture = TEXT_MODELS[config["model_type"]]
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(
            f"config.json: model_type {config['model_type']!r} needs an object text_config, which describes its "
            "text model"
        )
    shared = {
        name: config[name]
        for name in ("dtype", "torch_dtype", "quantization_config")
        if name in config
    }
    return {"model_type": f"{config['model_type']}_text"} | text | shared | {
        "architectures": [architecture]
    }, prefix


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
      ModelError: the file is missing or is not one.
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
    """Of the bytes of an array, after those that gave `before`. Some 2 GiB a second on one core."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), before)
