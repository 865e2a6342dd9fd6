"""The base model: a hub id, a local folder and a GGUF file are opened alike."""

import glob
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from lljax.data.template import turn_ends
from lljax.errors import ModelError
from lljax.files import first_line
from lljax.interop import safetensors
from lljax.interop.own_head import untie_if_they_differ
from lljax.interop.tokenizer_bounds import check, serialized

# What an export copies: the tokenizer, the code that an auto_map names, the license. No pattern begins with a wildcard that
# would reach the weights of other formats in subfolders, such as original/.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
                   "tekken.json", "tiktoken.model", "spiece.model", "sentencepiece*.model", "qwen.tiktoken",
                   "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
# What is downloaded of a hub repository; the shards that its index names follow.
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", safetensors.INDEX, "*.py", *TOKENIZER_FILES]
# By model_type, of models that read more than text: the prefix of the tensors of their text model, and its architecture.
TEXT_MODELS = {"llama4": ("language_model.", "Llama4ForCausalLM")}


class FolderBase:
    """A folder with config.json, safetensors and a tokenizer. The interface of every base:

    path: what the user named. config: HF config.json as a dict; where the folder holds more than a text model, that of the text
    model, and `prefix` is what the names of its tensors begin with there. names(), shape(name), read(name): tensors under their
    HF names and in HF orientation. stored(name, form): a kernel as it is stored, where it is quantised in that form.
    tokenizer(): a transformers fast tokenizer. folder: of its files; None for a GGUF file. checksum(name, before): crc32 of
    what is on disk of a tensor. fingerprint(): tells bases apart without reading their weights.
    """

    def __init__(self, path: str, folder: Path):
        self.path, self.folder = path, folder
        self.config, self.prefix = text_model(read_json(folder / "config.json"))
        self._tensors = None

    @property
    def tensors(self) -> safetensors.Folder:
        if self._tensors is None:            # opened late: a random initialisation needs none
            self._tensors = safetensors.Folder(self.folder)
        return self._tensors

    def names(self) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.tensors.names() if name.startswith(self.prefix)]

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
        from lljax.interop.tokenizer import open_tokenizer  # transformers is slow to import
        file, end = self.folder / "tokenizer_config.json", self.config.get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        tokenizer = open_tokenizer(self.path, self.folder, read_json(file) if file.is_file() else {},
                                   end if isinstance(end, int) else None)
        check(self.path, tokenizer)
        return tokenizer

    def fingerprint(self) -> str:
        """sha256 over config.json and the headers and sizes of the weight files; the weights are not read."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if (self.folder / "model.safetensors").exists() or (self.folder / safetensors.INDEX).exists():
            for file in self.tensors.files:
                with open(file.path, "rb") as opened:
                    digest.update(opened.read(file.header_bytes) + str(file.path.stat().st_size).encode())
        return digest.hexdigest()


def open_base(path: str, revision: str = "main"):
    """Opens a hub id, a folder, or a GGUF file. Local paths come first.

    Raises:
      ModelError: nothing there, or not a model that can be read.
    """
    local = _local(path)
    if local is None:
        return _folder(path, _download(path, revision))
    if local.suffix == ".gguf":
        from lljax.interop.gguf import GgufBase
        if not local.is_file():
            raise ModelError(f"model.path={path!r}: there is no such file")
        return GgufBase(path, local)
    if not local.is_dir():
        raise ModelError(f"model.path={path!r} is neither a folder nor a .gguf file")
    if not (local / "config.json").is_file():
        raise ModelError(f"model.path={path!r}: the folder has no config.json")
    return _folder(path, local)


def _local(path: str) -> Path | None:
    """The local file or folder that a path means; None for a hub id.

    Raises:
      ModelError: it cannot be either.
    """
    try:
        local = Path(path).expanduser()
        return local if local.suffix == ".gguf" or local.exists() else None
    except (RuntimeError, OSError) as error:     # the home of nobody; a name of 5,000 characters
        raise ModelError(f"model.path={path!r:.80}: no such folder ({first_line(error):.80})") from None


def _folder(path: str, folder: Path) -> FolderBase:
    base = FolderBase(path, folder)
    if base.config.get("quantization_config"):
        from lljax.interop.quantized import QuantisedFolder
        base = QuantisedFolder(path, folder)
    if (folder / "model.safetensors").exists() or (folder / safetensors.INDEX).exists():
        untie_if_they_differ(base)
    return base


def open_config(path: str, revision: str = "main") -> dict:
    """The HF config alone; of a hub id nothing else is downloaded.

    Raises:
      ModelError: as `open_base`.
    """
    if _local(path) is not None:
        return open_base(path, revision).config
    return text_model(read_json(_snapshot(path, revision, ["config.json"]) / "config.json"))[0]


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
        raise ModelError(f"config.json: model_type {config['model_type']!r} needs an object text_config, which describes its "
                         "text model")
    shared = {name: config[name] for name in ("dtype", "torch_dtype", "quantization_config") if name in config}
    return {"model_type": f"{config['model_type']}_text"} | text | shared | {"architectures": [architecture]}, prefix


def _download(path: str, revision: str) -> Path:
    """HUB_FILES of a hub repository, and the shards of its index."""
    folder = _snapshot(path, revision, HUB_FILES)
    if (folder / safetensors.INDEX).is_file():
        shards = read_json(folder / safetensors.INDEX).get("weight_map")
        if isinstance(shards, dict):             # else what opens them says what is wrong
            # Of the same commit, also where the branch has moved on.
            _snapshot(path, folder.name, sorted({glob.escape(str(shard)) for shard in shards.values()}))
    return folder


def _snapshot(path: str, revision: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files))
    except HFValidationError:
        raise ModelError(f"model.path={path!r:.80}: no such folder, and not a hub id either") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"model.path={path!r}: no such folder, and the hub does not give it ({first_line(error)})") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
      ModelError: the file is missing or is not one.
    """
    if not path.is_file():                   # nor a pipe or a device, which would be read without end
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


def end_tokens(base, tokenizer) -> frozenset[int]:
    """The tokens that end a text or a turn: the tokenizer's, those of generation_config.json or of a GGUF's metadata, and those
    that the chat template ends a reply with.

    Raises:
      ModelError: eos_token_id is something else than ids; the chat template does not end.
    """
    # As transformers reads them: config.json counts where there is no generation_config.json.
    file, held = ("generation_config.json", base.generation_config) if base.generation_config else ("config.json", base.config)
    named = held.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int and token >= 0 for token in named):
        raise ModelError(f"{base.path}: {file}: eos_token_id is no id nor a list of ids")
    return frozenset({tokenizer.eos_token_id, *named, *turn_ends(tokenizer)} - {None})


def special_tokens(tokenizer) -> dict[str, str]:
    """The special tokens by role, such as eos_token. They say how texts begin and end, and a file beside the vocabulary
    may change them."""
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items()}


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 over the vocabulary, merges and chat template."""
    digest = hashlib.sha256(serialized(tokenizer).encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()
