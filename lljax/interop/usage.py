"""How to load or serve an export, as its command prints it."""

import json
import shlex
from pathlib import Path
from typing import Any

from lljax.config.exports import BEYOND_PLAIN_LORA, DORA, NO_ADAPTER, OWN_KERNELS, SEVERAL
from lljax.interop.adapter_init import owns_kernel
from lljax.interop.base import Base
from lljax.interop.export_files import TEMPLATE_FILE
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, rope_to_hf
from lljax.models.lora import adaptable
from lljax.models.rope import KINDS
from lljax.models.spec import DecoderSpec

# peft 0.21 reads a property of the model that transformers 5.24 deprecates.
QUIET = (
    "import warnings; "
    'warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)\n'
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def adapter_usage(
    model: Decoder, base: Base, out: Path, config: dict, chat_template: str | None
) -> str:
    """Python that loads the adapter in `out` with PEFT, and how to serve it; config: its
    adapter_config.
    """
    path = Path(base.path)
    source = repr(base.path)
    if path.suffix == ".gguf":
        source = f"{str(path.parent)!r}, gguf_file={path.name!r}"
    multimodal = "transformers.AutoModelForImageTextToText.from_pretrained"
    auto = multimodal if base.adapted else loader(model.spec)
    # The config of a multimodal model has that of its text model inside.
    text = ".get_text_config()" if base.whole and not base.adapted else ""
    template = ""
    if chat_template is not None:
        template = (
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({source})\n"
            f"tokenizer.chat_template = open({str(out / TEMPLATE_FILE)!r}).read()\n"
        )
    return (
        "# rope.json holds the RoPE that the adapter was trained with; an adapter cannot carry it "
        "itself.\n"
        "import json, peft, transformers\n"
        f"rope = json.load(open({str(out / 'rope.json')!r}))\n"
        f"config = transformers.AutoConfig.from_pretrained({source}){text}\n"
        'if transformers.__version__ > "5": rope.pop("rope_scaling", None)'
        "  # the form of transformers 4\n"
        "config.get_text_config().update(rope)\n"
        f"model = {auto}({source}, config=config)\n"
        f"{QUIET}model = peft.PeftModel.from_pretrained(model, {str(out)!r})\n"
        f"{template}{_adapter_command(model, base, out, config, chat_template)}"
    )


def _adapter_command(
    model: Decoder, base: Base, out: Path, config: dict, chat_template: str | None
) -> str:
    """A comment with the command that serves an adapter, or the reason that none does."""
    if reason := beyond_plain_lora(model):
        return f"# vLLM takes no adapter with {reason}: export with --format=merged to serve it."
    if config["modules_to_save"]:
        return (
            "# vLLM takes no adapter with modules_to_save: export with --format=split or "
            "--format=merged to serve it."
        )
    if base.whole and not base.adapted:
        return (
            "# vLLM loads this base with its vision model, and this adapter is for its text model: "
            "export with --format=split or --format=merged to serve it."
        )
    rope = rope_to_hf(model.spec)
    if base.adapted:
        rope = {"text_config": base.adapted.rope(model.spec)}
    options = lora_options(out, config) | {"--hf-overrides": json.dumps(rope)}
    if chat_template is not None:
        options["--chat-template"] = out / TEMPLATE_FILE
    longest = base.tokenizer().model_max_length
    return serve_command(model.spec, base.path, options, tokenizer_length=longest)


def loader(spec: DecoderSpec) -> str:
    """The function of transformers that loads a model."""
    return f"transformers.{FAMILIES[spec.family].loader}.from_pretrained"


def lora_options(adapter: Path, config: dict) -> dict[str, Any]:
    """vLLM's options for an adapter with this adapter_config."""
    rank = max([config["r"], *config["rank_pattern"].values()])
    allowed = min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)
    return {"--lora-modules": f"adapter={adapter}", "--max-lora-rank": allowed}


def serve_command(
    spec: DecoderSpec,
    path: Path | str,
    options: dict[str, Any],
    tokenizer_length: float | None = None,
) -> str:
    """A comment with the command that serves `path`.

    tokenizer_length: the longest text of a tokenizer that is not part of the export, in tokens.
    """
    entries = rope_to_hf(spec)
    reach = min(entries["max_position_embeddings"], tokenizer_length or spec.max_length)
    if KINDS[spec.rope.type].vllm_multiplies:
        reach *= spec.rope.factor
    allow = "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 " if reach < spec.max_length else ""
    words = [word for name, value in options.items() for word in (name, value)]
    lora = ["--enable-lora"] if "--lora-modules" in options else []
    command = ["vllm", "serve", path, *lora, *words, "--max-model-len", spec.max_length]
    return f"# {allow}{' '.join(map(_shell, command))}"


def _shell(word: Any) -> str:
    """A word for the command line; line breaks and other control characters are escaped."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + text.encode("unicode_escape").decode("ascii").replace("'", r"\'") + "'"


def properties_of(model: Decoder) -> set[str]:
    """The properties of a model that a format may not hold, see lljax.config.exports."""
    loras = [lora for _, _, lora in adaptable(model) if lora is not None]
    properties = {
        NO_ADAPTER: not loras,
        OWN_KERNELS: any(map(owns_kernel, loras)),
        DORA: any(lora.magnitude is not None for lora in loras),
        SEVERAL: len({(lora.rank, lora.scale) for lora in loras}) > 1,
    }
    return {name for name, holds in properties.items() if holds}


def beyond_plain_lora(model: Decoder) -> str:
    """The property of the adapter that vLLM, which knows one rank and one scale, does not take; or
    an empty text.
    """
    properties = properties_of(model)
    return next((what for name, what in BEYOND_PLAIN_LORA.items() if name in properties), "")
