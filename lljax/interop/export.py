"""A trained model handed to the PyTorch world: as an adapter, merged, or split for a server that takes plain LoRA."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.huggingface import hf_names, hf_shape, hf_value
from lljax.interop.peft import write_adapter
from lljax.models import rope
from lljax.models.declare import Weight, declared
from lljax.models.lora import linear_layers

SHARD_BYTES = 5 << 30
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export_peft(model: nnx.Module, base, out: Path) -> str:
    """The adapter in PEFT's format, trained embeddings and norms included; returns how to load it.

    Raises:
      ConfigError: the run trained every weight, or `out` is taken.
    """
    _needs_adapter(model, "peft")

    def write(folder):
        config = write_adapter(model, folder, base_name=base.path)
        (folder / "rope.json").write_text(json.dumps(rope.to_hf(model.spec.rope, model.spec.max_length), indent=2) + "\n")
        return config
    config = _complete(out, write)
    note = "" if not config["modules_to_save"] else (
        "\n# vLLM takes no adapter with modules_to_save: export with --format=split or --format=merged to serve it.")
    return (f"# rope.json holds the RoPE that the adapter was trained with; an adapter cannot carry it itself.\n"
            f"import json, peft, transformers\n"
            f"config = transformers.AutoConfig.from_pretrained({base.path!r}, **json.load(open('{out}/rope.json')))\n"
            f"model = transformers.AutoModelForCausalLM.from_pretrained({base.path!r}, config=config)\n"
            f"model = peft.PeftModel.from_pretrained(model, '{out}'){note}")


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

    def write(folder):
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        _write_model(model, base, folder / "base", merge=False, dtype=None, max_shard_bytes=max_shard_bytes)
        return write_adapter(model, folder / "adapter", base_name=str(out / "base"), whole_modules=False)
    rank = _complete(out, write)["r"]
    rank = min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)
    return (f"# vllm serve {out}/base --enable-lora --lora-modules adapter={out}/adapter --max-lora-rank {rank} "
            f"--max-model-len {model.spec.max_length}\n"
            f"import peft, transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained('{out}/base')\n"
            f"model = peft.PeftModel.from_pretrained(model, '{out}/adapter')")


def _write_model(model, base, folder: Path, *, merge: bool, dtype, max_shard_bytes: int) -> None:
    """A HF checkpoint of the model's base weights, with the factors added to them where `merge`."""
    updates = {}                             # HF name -> (its Lora, layer)
    for _, linear in linear_layers(model) if merge else ():
        if linear.lora is not None:
            updates |= {name: (linear.lora, i) for i, name in enumerate(hf_names(linear.kernel))}
    sources: dict[str, Callable[[], np.ndarray]] = {}
    for _, variable in declared(model):
        if isinstance(variable, Weight):
            trained = variable.get_metadata().get("trainable", False)
            for i, name in enumerate(hf_names(variable)):
                if trained or name in updates or name not in base.names():
                    sources[name] = lambda v=variable, i=i, u=updates.get(name): _merged(hf_value(v, i), u)
                else:                        # bitwise as it was, whatever dtype the run computed in
                    sources[name] = lambda name=name: base.read(name)
    default = np.dtype(ml_dtypes.bfloat16)
    wanted = {name: np.dtype(getattr(ml_dtypes, dtype, dtype)) if dtype else
              base.dtype(name) if name in base.names() else default for name in sources}
    layout = {name: (wanted[name], hf_shape(variable)) for _, variable in declared(model)
              if isinstance(variable, Weight) for name in hf_names(variable)}
    safetensors.write_sharded(folder, layout, lambda name: np.asarray(sources[name]()).astype(wanted[name]),
                              max_shard_bytes=max_shard_bytes)
    spec = model.spec
    config = dict(base.config) | rope.to_hf(spec.rope, spec.max_length)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = base.tokenizer()
    tokenizer.model_max_length = spec.max_length
    tokenizer.save_pretrained(folder)


def _merged(weight: np.ndarray, update) -> np.ndarray:
    """The weight [out, in] plus its low-rank update, in float32."""
    if update is None:
        return weight
    lora, i = update
    return weight.astype(np.float32) + lora.scale * (hf_value(lora.b, i) @ hf_value(lora.a, i))


def _complete(out: Path, write):
    """Runs `write(folder)` on a folder that becomes `out` when it is complete."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out={out} is there already and not empty: name another folder or remove it")
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        result = write(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    return result


def _needs_adapter(model, format: str) -> None:
    if not any(linear.lora is not None for _, linear in linear_layers(model)):
        raise ConfigError(f"--format={format} exports an adapter, and this run trained every weight: use --format=merged")
