"""Opens the base model: a hub id, a local folder or a GGUF file."""

import glob
import hashlib
from pathlib import Path
from typing import Any

from lljax.config.shipped import shipped_model
from lljax.data.template import turn_ends
from lljax.errors import ModelError, first_line
from lljax.interop import safetensors
from lljax.interop.base import Base
from lljax.interop.folder import FolderBase, read_json
from lljax.interop.fused_experts import SplitExperts
from lljax.interop.multimodal import text_model
from lljax.interop.own_head import untie_if_they_differ
from lljax.interop.quantized import QuantizedFolder
from lljax.interop.tokenizer_bounds import serialized

# Files of the tokenizer and the license, which an export copies. No pattern begins with a wildcard
# that would reach the weights of other formats in subfolders, such as original/.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece*.model",
    "qwen.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# Files to download from a hub repository; the shards that its index names follow.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    safetensors.INDEX,
    "*.py",
    *TOKENIZER_FILES,
]


def open_base(path: str, revision: str = "main") -> Base:
    """Opens a hub id, a folder or a GGUF file. Local paths have precedence.

    Raises:
      ModelError: there is no such model, or it cannot be read.
    """
    local = _local(path)
    if local is None:
        return _folder(path, _download(path, revision))
    if local.suffix == ".gguf":
        from lljax.interop.gguf import GgufBase  # the package is slow to import

        if not local.is_file():
            raise ModelError(f"model.path={path!r}: there is no such file")
        return GgufBase(path, local)
    if not local.is_dir():
        raise ModelError(f"model.path={path!r} is neither a folder nor a .gguf file")
    if not (local / "config.json").is_file():
        raise ModelError(f"model.path={path!r}: the folder has no config.json")
    return _folder(path, local)


def _local(path: str) -> Path | None:
    """The local file or folder of this name; None for a hub id.

    Raises:
      ModelError: it cannot be either.
    """
    try:
        local = Path(shipped_model(path)).expanduser()
        return local if local.suffix == ".gguf" or local.exists() else None
    except (RuntimeError, OSError) as error:  # the home of nobody; a name of 5,000 characters
        raise ModelError(
            f"model.path={path!r:.80}: no such folder ({first_line(error):.80})"
        ) from None


def _folder(path: str, folder: Path) -> Base:
    base: Base = FolderBase(path, folder)
    if base.config.get("quantization_config"):
        base = QuantizedFolder(path, folder)
    if base.whole is not None and base.whole.model.fused_experts:
        base = SplitExperts(base)
    if (folder / "model.safetensors").exists() or (folder / safetensors.INDEX).exists():
        untie_if_they_differ(base)
    return base


def open_config(path: str, revision: str = "main") -> dict[str, Any]:
    """The HF config alone; nothing else of a hub id is downloaded.

    Raises:
      ModelError: as `open_base`.
    """
    if _local(path) is not None:
        return open_base(path, revision).config
    return text_model(read_json(_snapshot(path, revision, ["config.json"]) / "config.json"))[0]


def _download(path: str, revision: str) -> Path:
    """Downloads HUB_FILES of a hub repository and the shards of its index."""
    folder = _snapshot(path, revision, HUB_FILES)
    if (folder / safetensors.INDEX).is_file():
        shards = read_json(folder / safetensors.INDEX).get("weight_map")
        if isinstance(shards, dict):  # else reading the index fails with a reason
            # Of the same commit, even if the branch has moved on.
            files = sorted({glob.escape(str(shard)) for shard in shards.values()})
            _snapshot(path, folder.name, files)
    return folder


def _snapshot(path: str, revision: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files))
    except HFValidationError:
        raise ModelError(
            f"model.path={path!r:.80}: no such folder, and not a hub id either"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.path={path!r}: no such folder, and the hub does not give it "
            f"({first_line(error)})"
        ) from None


def end_tokens(base: Base, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text or a turn: of the tokenizer, of generation_config.json or a GGUF's
    metadata, and of the end of a reply in the chat template.

    Raises:
      ModelError: eos_token_id is neither an id nor a list of ids; the chat template does not end.
    """
    # As transformers reads them: config.json counts if there is no generation_config.json.
    file, config = "generation_config.json", base.generation_config
    if not config:
        file, config = "config.json", base.config
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in ends):
        raise ModelError(f"{base.path}: {file}: eos_token_id is no id nor a list of ids")
    return frozenset({tokenizer.eos_token_id, *ends, *turn_ends(tokenizer)} - {None})


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """The special tokens by role, such as eos_token, which begin and end texts.

    A file beside the vocabulary may change them.
    """
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items()}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary, merges and chat template."""
    digest = hashlib.sha256(serialized(tokenizer).encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()
