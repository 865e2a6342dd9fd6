"""The files beside the weights of an exported model: the base's, with the changed fields edited.

Both transformers 4.57 and 5 read these files, and a file that needs no change is a copy.
"""

import json
import re
import shutil
from pathlib import Path

from lljax.errors import ModelError
from lljax.interop.folder import read_json
from lljax.interop.open import TOKENIZER_FILES, end_tokens
from lljax.models.families import rope_to_hf, spec_from_hf
from lljax.models.spec import DecoderSpec

TEMPLATE_FILE = "chat_template.jinja"
# Other names of max_position_embeddings; vLLM takes the least of those that are set.
LENGTHS = (
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_len",
    "seq_length",
    "model_max_length",
)
RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)


def write_files(
    base,
    folder: Path,
    spec: DecoderSpec,
    tokenizer,
    *,
    dtype: str | None,
    chat_template: str | None,
    quantization: dict | None = None,
) -> None:
    """Writes the files beside the weights of a model with this `spec` to an existing folder.

    dtype: the dtype of the weights; None for the base's. chat_template: the template that the run
    trained under, if the base has none. quantization: config.json's quantization_config; None for
    dense weights.

    Raises:
      ModelError: a file of the base cannot be read, or is a link out of its folder.
    """
    if base.folder is not None:
        for file in _own_files(base.folder):
            (folder / file.parent).mkdir(exist_ok=True)
            shutil.copyfile(base.folder / file, folder / file)
    else:
        tokenizer.save_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    changed = _changed(base, spec)
    config = _config(base, spec, changed, dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(folder / "config.json", config, base)
    if generation := _generation_config(base, spec, changed, tokenizer):
        _write_json(folder / "generation_config.json", generation, base)
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    if config := _tokenizer_config(config, spec, changed):
        _write_json(file, config, base)


def _own_files(folder: Path) -> list[Path]:
    """The files of a base, relative to its folder, that an export copies.

    Raises:
      ModelError: one is a link out of the folder. A downloaded folder links into the hub's store.
    """
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    code = {
        folder / f"{module}.py"
        for name in ("config.json", "tokenizer_config.json")
        for module in _modules(folder / name)
    }
    while code:  # and the modules that it imports from its folder
        files |= code
        texts = [file.read_text(errors="replace") for file in code if file.is_file()]
        imported = {name for text in texts for name in RELATIVE_IMPORT.findall(text)}
        code = {folder / f"{name}.py" for name in imported} - files
    store = folder.parent.parent if folder.parent.name == "snapshots" else folder
    files = sorted(file for file in files if file.is_file())
    for file in files:
        if not file.resolve().is_relative_to(store.resolve()):
            raise ModelError(
                f"{file}: a link out of the model's folder is not copied: put the file itself there"
            )
    return [file.relative_to(folder) for file in files]


def _modules(path: Path) -> set[str]:
    """The Python modules of the folder that the auto_map in this file names."""
    named = (read_json(path) if path.is_file() else {}).get("auto_map") or {}
    values = named.values() if isinstance(named, dict) else [named]
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {
        name.split(".")[0]
        for name in classes
        if isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name)
    }


def _changed(base, spec: DecoderSpec) -> bool:
    """Whether the RoPE or the length differs from the base's."""
    own = spec_from_hf(base.config)
    return any(
        getattr(own, name) != getattr(spec, name) for name in ("rope", "more_ropes", "max_length")
    )


def _config(base, spec: DecoderSpec, changed: bool, dtype: str | None) -> dict:
    config = dict(base.config)
    config.pop("quantization_config", None)  # of the base
    if changed or "rope_parameters" in config:  # transformers 4 does not read that
        config |= rope_to_hf(spec)
    if changed:
        length = config["max_position_embeddings"]
        config |= {name: length for name in LENGTHS if isinstance(config.get(name), int)}
    if dtype:
        config |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 and 4
    return config


def _generation_config(base, spec: DecoderSpec, changed: bool, tokenizer) -> dict | None:
    """generation_config.json with every token that ends a reply; None if config.json names them."""
    own, ends = base.generation_config, end_tokens(base, tokenizer)
    if changed and own is not None and isinstance(own.get("max_length"), int):
        own = own | {"max_length": spec.max_length}
    named = (base.config if own is None else own).get("eos_token_id")
    named = named if isinstance(named, list) else [named] if named is not None else []
    if ends <= set(named):
        return own
    if own is None:  # fields that transformers takes from config.json instead
        names = ("bos_token_id", "pad_token_id")
        own = {name: base.config[name] for name in names if base.config.get(name) is not None}
    return own | {"eos_token_id": [*named, *sorted(ends - set(named))]}


def _tokenizer_config(config: dict, spec: DecoderSpec, changed: bool) -> dict:
    limit = config.get("model_max_length")
    if changed or (limit is not None and limit < spec.max_length):  # vLLM reads no further
        config["model_max_length"] = spec.max_length
    # Values that transformers 5 writes and 4 does not read.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _write_json(path: Path, content: dict, base) -> None:
    """Writes `content` in the layout of the base's file of this name; a copy if they are equal."""
    original = base.folder / path.name if base.folder is not None else None
    layout = {"indent": 2, "ensure_ascii": False}
    if original is not None and original.is_file():
        text = original.read_text(encoding="utf-8")
        if json.loads(text) == content:
            shutil.copyfile(original, path)
            return
        indent = re.match(r"\s*\{\s*\n([ \t]+)", text)
        layout = {"indent": indent[1] if indent else None, "ensure_ascii": text.isascii()}
    path.write_text(json.dumps(content, **layout) + "\n", encoding="utf-8")
