"""A trained model handed to the PyTorch world: as an adapter, merged, or split for a server that
takes plain LoRA.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from lljax.errors import ConfigError, printable
from lljax.interop import safetensors
from lljax.interop.adapter_init import StartedBase, owns_kernel, starts_from_base
from lljax.interop.export_files import TEMPLATE_FILE, write_files
from lljax.interop.export_folder import complete
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value, joined, parts_of
from lljax.interop.peft import write_adapter
from lljax.models.declare import declared
from lljax.models.lora import adaptable
from lljax.models.spec import rope_to_hf

SHARD_BYTES = 5 << 30
DTYPES = ("float32", "bfloat16", "float16")
# peft 0.21 reads a property of the model that transformers 5.24 deprecates.
QUIET = 'import warnings; warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)\n'
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export_peft(
    model: nnx.Module,
    base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> str:
    """Writes the adapter in PEFT's format, trained embeddings and norms included; returns how to
    load it.

    dtype: none, since an adapter is float32. overwrite: replaces an earlier export in `out`.
      chat_template: the template that the run trained under, where the base has none.

    Raises:
      ConfigError: the run trained every weight, a weight is not finite, or `out` is taken.
    """
    _needs_adapter(model, "peft")
    if dtype not in (None, "float32"):
        raise ConfigError(
            f"--dtype={dtype}: an adapter is written in float32, and is cast where it is loaded; --dtype is for "
            "--format=merged and --format=split"
        )
    if any(owns_kernel(lora) for _, _, lora in adaptable(model)):
        raise ConfigError(
            "--format=peft: the kernels that lora.init='loftq' quantised are in no base that PEFT could load: "
            "use --format=split, which writes them too, or --format=merged"
        )

    def write(folder):
        config = write_adapter(model, folder, base_name=base.path, base=base)
        (folder / "rope.json").write_text(json.dumps(rope_to_hf(model.spec), indent=2) + "\n")
        if chat_template is not None:
            (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        return config

    _check(model, base, out)
    config = complete(out, "peft", write, overwrite)
    if reason := _not_plain(model):
        note = f"# vLLM takes no adapter with {reason}: export with --format=merged to serve it."
    elif config["modules_to_save"]:
        note = (
            "# vLLM takes no adapter with modules_to_save: export with --format=split or --format=merged to serve "
            "it."
        )
    else:
        options = {
            "--lora-modules": f"adapter={out}",
            "--max-lora-rank": _vllm_rank(config),
            "--hf-overrides": json.dumps(rope_to_hf(model.spec)),
        }
        if chat_template is not None:
            options["--chat-template"] = out / TEMPLATE_FILE
        note = _serve(
            model.spec, base.path, options, tokenizer_length=base.tokenizer().model_max_length
        )
    gguf = Path(base.path).suffix == ".gguf"
    source = (
        f"{str(Path(base.path).parent)!r}, gguf_file={Path(base.path).name!r}"
        if gguf
        else repr(base.path)
    )
    # which has a config of its own in that of the whole
    text_model = ".get_text_config()" if base.prefix else ""
    template = (
        ""
        if chat_template is None
        else (
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({source})\n"
            f"tokenizer.chat_template = open({str(out / TEMPLATE_FILE)!r}).read()\n"
        )
    )
    return (
        f"# rope.json holds the RoPE that the adapter was trained with; an adapter cannot carry it itself.\n"
        f"import json, peft, transformers\nrope = json.load(open({str(out / 'rope.json')!r}))\n"
        f"config = transformers.AutoConfig.from_pretrained({source}){text_model}\n"
        'if transformers.__version__ > "5": rope.pop("rope_scaling", None)  # the form of transformers 4\n'
        f"config.update(rope)\nmodel = transformers.AutoModelForCausalLM.from_pretrained({source}, config=config)\n"
        f"{QUIET}model = peft.PeftModel.from_pretrained(model, {str(out)!r})\n{template}{note}"
    )


def export_merged(
    model: nnx.Module,
    base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a full HF checkpoint, the adapter merged in, with the RoPE and lengths that
    transformers and vLLM need.

    dtype: of the weights, one of DTYPES; None for the base's, to which trained weights are then
      rounded. Others as `export_peft`. Returns how to load it.
    """
    _check_dtype(dtype)
    _check(model, base, out)
    rounded = complete(
        out,
        "merged",
        lambda folder: _write_model(
            model,
            base,
            folder,
            merge=True,
            dtype=dtype,
            chat_template=chat_template,
            max_shard_bytes=max_shard_bytes,
        ),
        overwrite,
    )
    return (
        f"import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"{_serve(model.spec, out, {})}{rounded}"
    )


def export_split(
    model: nnx.Module,
    base,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """`out`/base: the base with the tuned embeddings and norms and its RoPE written in;
    `out`/adapter: the factors alone, which vLLM's --enable-lora takes. Arguments as
    `export_merged`. Returns how to serve them.
    """
    _needs_adapter(model, "split")
    _check_dtype(dtype)
    if reason := _not_plain(model):
        raise ConfigError(
            f"--format=split is for servers that take plain LoRA, and this adapter has {reason}: use "
            "--format=merged or --format=peft"
        )
    _check(model, base, out)

    def write(folder):
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        rounded = _write_model(
            model,
            base,
            folder / "base",
            merge=False,
            dtype=dtype,
            chat_template=chat_template,
            max_shard_bytes=max_shard_bytes,
        )
        name = str(out.resolve() / "base")
        return rounded, write_adapter(
            model, folder / "adapter", base_name=name, base=base, whole_modules=False
        )

    rounded, config = complete(out, "split", write, overwrite)
    options = {
        "--lora-modules": f"adapter={out / 'adapter'}",
        "--max-lora-rank": _vllm_rank(config),
    }
    return (
        f"{_serve(model.spec, out / 'base', options)}\n"
        f"import peft, transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained({str(out / 'base')!r})\n"
        f"{QUIET}model = peft.PeftModel.from_pretrained(model, {str(out / 'adapter')!r}){rounded}"
    )


FORMATS = {"peft": export_peft, "merged": export_merged, "split": export_split}


def _serve(spec, path, options: dict, tokenizer_length: float | None = None) -> str:
    """A comment with the command that serves `path`. tokenizer_length: of a tokenizer that is not
    part of the export.
    """
    entries = rope_to_hf(spec)
    reach = min(entries["max_position_embeddings"], tokenizer_length or spec.max_length)
    if spec.rope.type in ("linear", "dynamic"):
        reach *= spec.rope.factor  # as vLLM does
    allow = "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 " if reach < spec.max_length else ""
    words = [word for name, value in options.items() for word in (name, value)]
    lora = ["--enable-lora"] if "--lora-modules" in options else []
    command = ["vllm", "serve", path, *lora, *words, "--max-model-len", spec.max_length]
    return f"# {allow}{' '.join(map(_shell, command))}"


def _shell(word) -> str:
    """A word for the command line; one with line breaks or other control characters stays on the
    line.
    """
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + text.encode("unicode_escape").decode("ascii").replace("'", r"\'") + "'"


def _not_plain(model) -> str:
    """What the adapter has that vLLM, which knows one rank and one scale, does not take; or an
    empty text.
    """
    loras = [lora for _, _, lora in adaptable(model) if lora is not None]
    if any(lora.magnitude is not None for lora in loras):
        return "the magnitudes of DoRA"
    return "several ranks or scales" if len({(lora.rank, lora.scale) for lora in loras}) > 1 else ""


def _vllm_rank(config: dict) -> int:
    """The least value of --max-lora-rank that admits an adapter with this adapter_config."""
    rank = max([config["r"], *config["rank_pattern"].values()])
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)


def _write_model(
    model, base, folder: Path, *, merge: bool, dtype, chat_template, max_shard_bytes: int
) -> str:
    """A HF checkpoint of the model's base weights, with the factors added to them where `merge`.

    Returns a comment on trained weights that were rounded to a type of the base, or an empty text.
    """
    tokenizer = base.tokenizer()  # first: a base without one is noticed before the long write
    # A run that trained every weight needs none of the base's, which may have none.
    parts_of_tensors = parts_of(model)
    trained = {
        name: parts[0][0].get_metadata().get("trainable", False)
        for name, parts in parts_of_tensors.items()
    }
    available = set() if all(trained.values()) else set(base.names())
    # HF name -> [(weight, its Lora, which of its tensors)]; -> [(weight, which)]
    updates, own = {}, {}
    for _, weight, lora in adaptable(model):
        for i, name in enumerate(hf_names(weight)) if lora is not None else ():
            if merge:
                updates.setdefault(name, []).append((weight, lora, i))
            if owns_kernel(lora):
                own.setdefault(name, []).append((weight, i))
    started = StartedBase(base, model) if starts_from_base(model) else base
    sources: dict[str, Callable[[], np.ndarray]] = {}
    copied = set()
    for name, parts in parts_of_tensors.items():
        if trained[name] or name not in available:
            sources[name] = lambda parts=parts: joined(parts)
        elif name in own:  # they belong to the factors, also where these are not merged
            sources[name] = lambda name=name: _merged(
                _replaced(base.read(name), own[name]), updates.get(name, ())
            )
        elif name in updates:  # to the base's own weight: the run's copy may be rounded
            sources[name] = lambda name=name: _merged(started.read(name), updates[name])
        else:  # bitwise as it was, whatever dtype the run computed in
            sources[name] = lambda name=name: base.read(name)
            copied.add(name)
    named = dtype or base.config.get("dtype") or base.config.get("torch_dtype") or "bfloat16"
    default = np.dtype(getattr(ml_dtypes, named, named))
    wanted = {
        name: base.dtype(name) if name in available and not dtype else default for name in sources
    }

    def value(name):
        read = np.asarray(sources[name]())
        with np.errstate(over="ignore"):  # reported below
            written = read.astype(wanted[name])
        if (name not in copied or read.dtype != written.dtype) and not np.isfinite(written).all():
            raise ConfigError(
                f"tensor {name!r} is not finite in {wanted[name]}: "
                + (
                    "use --dtype=bfloat16"
                    if np.isfinite(read).all()
                    else "export an earlier --step"
                )
            )
        return written

    layout = {
        name: (wanted[name], hf_shape(parts[0][0])) for name, parts in parts_of_tensors.items()
    }
    safetensors.write_sharded(folder, layout, value, max_shard_bytes=max_shard_bytes)
    write_files(base, folder, model.spec, tokenizer, dtype=dtype, chat_template=chat_template)
    rounded = sorted(
        {str(wanted[name]) for name in sources.keys() - copied if wanted[name].itemsize < 4}
    )
    return (
        ""
        if dtype or not rounded
        else (
            f"\n# Trained weights are rounded to {' and '.join(rounded)}, the type of the "
            "base: --dtype=float32 writes all weights in float32."
        )
    )


def _replaced(weight: np.ndarray, kernels) -> np.ndarray:
    """The weight with those of its parts that the run has kernels of its own for, in float32."""
    weight = weight.astype(np.float32)  # a copy
    for kernel, i in kernels:
        weight[hf_part(kernel)] = hf_value(kernel, i)
    return weight


def _merged(weight: np.ndarray, updates) -> np.ndarray:
    """The weight with what adapters make of its parts, in float32."""
    weight = weight.astype(np.float32)  # a copy
    for kernel, lora, i in updates:
        # [..., out, in]
        part, update = hf_part(kernel), lora.scale * (hf_value(lora.b, i) @ hf_value(lora.a, i))
        weight[part] += np.swapaxes(update, -1, -2) if lora.turned else update
        if lora.magnitude is not None:
            weight[part] *= (hf_value(lora.magnitude, i) / np.linalg.norm(weight[part], axis=1))[
                :, None
            ]
    return weight


def _needs_adapter(model, format: str) -> None:
    if all(lora is None for _, _, lora in adaptable(model)):
        raise ConfigError(
            f"--format={format} exports an adapter, and this run trained every weight: use --format=merged"
        )


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype={dtype} is none of {', '.join(DTYPES)}")


def _check(model, base, out: Path) -> None:
    """Refuses a model that training has broken, and a folder that holds the base."""
    for name, variable in declared(model):
        if variable.get_metadata().get("trainable", False) and not bool(
            jnp.isfinite(variable.get_value()).all()
        ):
            raise ConfigError(
                f"{name} holds values that are not finite, so nothing is exported: take an earlier checkpoint "
                "with --step"
            )
    if (base.folder or base.file).resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--out={printable(str(out))} holds the base of the run: name another folder"
        )
