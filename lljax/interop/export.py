"""A trained model handed to the PyTorch world: as an adapter, merged, or split for a server that takes plain LoRA."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value, joined, parts_of
from lljax.interop.peft import write_adapter
from lljax.interop.started import StartedBase, owns_kernel, starts_from_base
from lljax.models.lora import adaptable
from lljax.models.spec import rope_to_hf

SHARD_BYTES = 5 << 30
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export_peft(model: nnx.Module, base, out: Path) -> str:
    """The adapter in PEFT's format, trained embeddings and norms included; returns how to load it.

    Raises:
      ConfigError: the run trained every weight, or `out` is taken.
    """
    _needs_adapter(model, "peft")
    if any(owns_kernel(lora) for _, _, lora in adaptable(model)):
        raise ConfigError("--format=peft: the kernels that lora.init='loftq' quantised are in no base that PEFT could load: "
                          "use --format=split, which writes them too, or --format=merged")

    def write(folder):
        config = write_adapter(model, folder, base_name=base.path, base=base)
        (folder / "rope.json").write_text(json.dumps(rope_to_hf(model.spec), indent=2) + "\n")
        return config
    config = _complete(out, write)
    if reason := _not_plain(model):
        note = f"# vLLM takes no adapter with {reason}: export with --format=merged to serve it."
    elif config["modules_to_save"]:
        note = ("# vLLM takes no adapter with modules_to_save: export with --format=split or --format=merged to serve "
                "it.")
    else:
        overrides = json.dumps(rope_to_hf(model.spec))
        note = (f"# vllm serve {base.path} --enable-lora --lora-modules adapter={out} --max-lora-rank "
                f"{_vllm_rank(config)} --max-model-len {model.spec.max_length} --hf-overrides '{overrides}'")
    gguf = Path(base.path).suffix == ".gguf"
    source = f"{str(Path(base.path).parent)!r}, gguf_file={Path(base.path).name!r}" if gguf else repr(base.path)
    changed = f"transformers.AutoConfig.from_pretrained({source}, **json.load(open('{out}/rope.json')))"
    if base.prefix:                          # the text model has a config of its own in that of the whole
        changed = (f"transformers.AutoConfig.from_pretrained({source}).get_text_config()\n"
                   f"config = type(config).from_dict(config.to_dict() | json.load(open('{out}/rope.json')))")
    return (f"# rope.json holds the RoPE that the adapter was trained with; an adapter cannot carry it itself.\n"
            f"import json, peft, transformers\nconfig = {changed}\n"
            f"model = transformers.AutoModelForCausalLM.from_pretrained({source}, config=config)\n"
            f"model = peft.PeftModel.from_pretrained(model, '{out}')\n{note}")


def export_merged(model: nnx.Module, base, out: Path, *, dtype: str | None = None,
                  max_shard_bytes: int = SHARD_BYTES) -> str:
    """A full HF checkpoint, adapter merged in, with the RoPE and lengths that transformers and vLLM need.

    dtype: of the weights; None for that of the base. Returns how to load it.
    """
    _complete(out, lambda folder: _write_model(model, base, folder, merge=True, dtype=dtype,
                                               max_shard_bytes=max_shard_bytes))
    return (f"import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained('{out}')\n"
            f"# vllm serve {out} --max-model-len {model.spec.max_length}")


def export_split(model: nnx.Module, base, out: Path, *, max_shard_bytes: int = SHARD_BYTES) -> str:
    """`out`/base: the base with the tuned embeddings and norms and its RoPE written in; `out`/adapter: the factors
    alone, which vLLM's --enable-lora takes. Returns how to serve them."""
    _needs_adapter(model, "split")
    if reason := _not_plain(model):
        raise ConfigError(f"--format=split is for servers that take plain LoRA, and this adapter has {reason}: use "
                          "--format=merged or --format=peft")

    def write(folder):
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        _write_model(model, base, folder / "base", merge=False, dtype=None, max_shard_bytes=max_shard_bytes)
        return write_adapter(model, folder / "adapter", base_name=str(out / "base"), base=base, whole_modules=False)
    rank = _vllm_rank(_complete(out, write))
    return (f"# vllm serve {out}/base --enable-lora --lora-modules adapter={out}/adapter --max-lora-rank {rank} "
            f"--max-model-len {model.spec.max_length}\n"
            f"import peft, transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained('{out}/base')\n"
            f"model = peft.PeftModel.from_pretrained(model, '{out}/adapter')")


def _not_plain(model) -> str:
    """What the adapter has that vLLM, which knows one rank and one scale, does not take; or an empty text."""
    loras = [lora for _, _, lora in adaptable(model) if lora is not None]
    if any(lora.magnitude is not None for lora in loras):
        return "the magnitudes of DoRA"
    return "several ranks or scales" if len({(lora.rank, lora.scale) for lora in loras}) > 1 else ""


def _vllm_rank(config: dict) -> int:
    """The least value of --max-lora-rank that admits an adapter with this adapter_config."""
    rank = max([config["r"], *config["rank_pattern"].values()])
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)


def _write_model(model, base, folder: Path, *, merge: bool, dtype, max_shard_bytes: int) -> None:
    """A HF checkpoint of the model's base weights, with the factors added to them where `merge`."""
    tokenizer = base.tokenizer()             # first: a base without one is noticed before the long write
    # A run that trained every weight needs none of the base's, which may have none.
    parts_of_tensors = parts_of(model)
    trained = {name: parts[0][0].get_metadata().get("trainable", False) for name, parts in parts_of_tensors.items()}
    available = set() if all(trained.values()) else set(base.names())
    updates, own = {}, {}                    # HF name -> [(weight, its Lora, which of its tensors)]; -> [(weight, which)]
    for _, weight, lora in adaptable(model):
        for i, name in enumerate(hf_names(weight)) if lora is not None else ():
            if merge:
                updates.setdefault(name, []).append((weight, lora, i))
            if owns_kernel(lora):
                own.setdefault(name, []).append((weight, i))
    started = StartedBase(base, model) if starts_from_base(model) else base
    sources: dict[str, Callable[[], np.ndarray]] = {}
    for name, parts in parts_of_tensors.items():
        if trained[name] or name not in available:
            sources[name] = lambda parts=parts: joined(parts)
        elif name in own:                    # they belong to the factors, also where these are not merged
            sources[name] = lambda name=name: _merged(_replaced(base.read(name), own[name]), updates.get(name, ()))
        elif name in updates:                # to the base's own weight: the run's copy may be rounded
            sources[name] = lambda name=name: _merged(started.read(name), updates[name])
        else:                                # bitwise as it was, whatever dtype the run computed in
            sources[name] = lambda name=name: base.read(name)
    named = dtype or base.config.get("dtype") or base.config.get("torch_dtype") or "bfloat16"
    default = np.dtype(getattr(ml_dtypes, named, named))
    wanted = {name: base.dtype(name) if name in available and not dtype else default for name in sources}
    layout = {name: (wanted[name], hf_shape(parts[0][0])) for name, parts in parts_of_tensors.items()}
    safetensors.write_sharded(folder, layout, lambda name: np.asarray(sources[name]()).astype(wanted[name]),
                              max_shard_bytes=max_shard_bytes)
    spec = model.spec
    config = dict(base.config) | rope_to_hf(spec)
    config.pop("quantization_config", None)  # what is written is dense
    if dtype:
        config |= {"dtype": dtype, "torch_dtype": dtype}     # in the spelling of transformers 5 and the one before
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if base.generation_config:
        (folder / "generation_config.json").write_text(json.dumps(base.generation_config, indent=2) + "\n")
    tokenizer.model_max_length = spec.max_length
    tokenizer.save_pretrained(folder)


def _replaced(weight: np.ndarray, kernels) -> np.ndarray:
    """The weight with those of its parts that the run has kernels of its own for, in float32."""
    weight = weight.astype(np.float32)       # a copy
    for kernel, i in kernels:
        weight[hf_part(kernel)] = hf_value(kernel, i)
    return weight


def _merged(weight: np.ndarray, updates) -> np.ndarray:
    """The weight with what adapters make of its parts, in float32."""
    weight = weight.astype(np.float32)       # a copy
    for kernel, lora, i in updates:
        part, update = hf_part(kernel), lora.scale * (hf_value(lora.b, i) @ hf_value(lora.a, i))     # [..., out, in]
        weight[part] += np.swapaxes(update, -1, -2) if lora.turned else update
        if lora.magnitude is not None:
            weight[part] *= (hf_value(lora.magnitude, i) / np.linalg.norm(weight[part], axis=1))[:, None]
    return weight


def _complete(out: Path, write):
    """Runs `write(folder)` on a folder that becomes `out` when it is complete."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} is a file or a folder that is not empty: name another, or remove it")
    out = out.resolve()
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        result = write(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if out.exists():                         # filled, not replaced: it may be where the user's shell is
        for child in unfinished.iterdir():
            child.rename(out / child.name)
        unfinished.rmdir()
    else:
        unfinished.rename(out)
    return result


def _needs_adapter(model, format: str) -> None:
    if all(lora is None for _, _, lora in adaptable(model)):
        raise ConfigError(f"--format={format} exports an adapter, and this run trained every weight: use --format=merged")
