"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from lljax.errors import ConfigError, ModelError
from lljax.interop import safetensors
from lljax.interop.base import read_json
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value, tensors
from lljax.models.declare import LoraWeight, Weight, declared
from lljax.models.lora import linear_layers
from lljax.sharding import put

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# What changes the mathematics and is not read here, with the value that means "not used".
UNSUPPORTED = {"use_dora": (None, False), "bias": (None, "none"), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
               "fan_in_fan_out": (None, False), "layers_to_transform": (None, []), "lora_bias": (None, False),
               "trainable_token_indices": (None, []), "layer_replication": (None, []), "exclude_modules": (None, []),
               "alora_invocation_tokens": (None, []), "target_parameters": (None, []), "use_qalora": (None, False),
               "use_bdlora": (None, False), "arrow_config": (None,), "monteclora_config": (None,),
               "kasa_config": (None,), "velora_config": (None,),
               # pissa, olora, corda and loftq change the base's weights when they start.
               "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}
MODULES = {"embed": "embed_tokens", "head": "lm_head"}   # modules_to_save by role; norms have several names


class AdapterConfig(NamedTuple):
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    also_train: tuple[str, ...]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What lora.attach needs to know of an adapter made here or elsewhere.

    Raises:
      ModelError: no adapter there, or one of a kind that is not supported.
    """
    path = Path(folder) / "adapter_config.json"
    c = read_json(path)
    if c.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {c.get('peft_type')!r}, and LORA is supported")
    for field, unused in UNSUPPORTED.items():
        if c.get(field) not in unused:
            raise ModelError(f"{path}: {field}={c[field]!r} is not supported; merge this adapter with PEFT and use the "
                             "merged model as the base")
    try:
        targets = c["target_modules"]
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        saved = tuple(c.get("modules_to_save") or ())
        if not all(isinstance(name, str) for name in targets + saved) or int(c["r"]) < 1:
            raise ValueError("target_modules and modules_to_save hold names, and r is at least 1")
        roles = {role for role, name in MODULES.items() if name in saved}
        roles |= {"norm"} if any(name.endswith("norm") for name in saved) else set()
        return AdapterConfig(int(c["r"]), float(c["lora_alpha"]), bool(c.get("use_rslora")), targets, tuple(sorted(roles)))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {type(error).__name__}: {error}") from None


def load_adapter(model: nnx.Module, folder, *, shardings=None) -> None:
    """Fills the factors and the trained base Variables of a model (adapters attached) from an adapter's folder.

    Raises:
      ModelError: a tensor is missing, left over, or has another shape; the model scales its factors in another way.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    for _, linear in linear_layers(model):   # shapes do not show these, and they change what the factors mean
        lora = linear.lora
        if lora is not None and (lora.alpha, lora.rslora) != (config.alpha, config.rslora):
            raise ModelError(f"{folder}: the adapter has alpha={config.alpha} and rslora={config.rslora}: set "
                             "lora.alpha and lora.rslora as it has them")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; adapters are read from safetensors only")
    file = safetensors.File(path)
    left = set(file.entries)
    for _, variable in declared(model):
        if not variable.get_metadata().get("trainable", False):
            continue
        names = [PREFIX + name for name in hf_names(variable)]
        if isinstance(variable, Weight) and names[0] not in file.entries:
            continue                         # trained here from its base value on
        for name in names:
            if name not in file.entries:
                raise ModelError(f"{path}: tensor {name!r} is missing")
            if file.entries[name][1] != hf_shape(variable):
                raise ModelError(f"{path}: tensor {name!r} has shape {file.entries[name][1]}, and the model has "
                                 f"{hf_shape(variable)}: set lora.rank and lora.targets as in the adapter")
        left -= set(names)
        layers = [np.asarray(file.read(name), np.float32) for name in names]
        layers = [layer.T if variable.get_metadata("transpose") else layer for layer in layers]
        value = np.stack(layers).reshape(variable.get_value().shape)
        variable.set_value(put(value, shardings(variable) if shardings else None))
    head, embed = (PREFIX + name for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if model.spec.tied and {head, embed} <= file.entries.keys():
        if not np.array_equal(file.read(head), file.read(embed)):
            raise ModelError(f"{path}: lm_head was trained apart from the embedding it is tied to; this model has no "
                             "place for both")
        left.discard(head)
    if left:
        raise ModelError(f"{path}: {len(left)} tensors have no place in this configuration, such as {sorted(left)[0]!r}: "
                         "name their modules in lora.targets or lora.also_train")


def write_adapter(model: nnx.Module, folder: Path, *, base_name: str, whole_modules: bool = True) -> dict:
    """Writes the adapter of a model to an existing folder; returns its adapter_config.

    whole_modules: with the embeddings, norms and heads that trained (`modules_to_save`), or the factors alone.

    Raises:
      ConfigError: PEFT would read the factors of experts in another way.
    """
    _check_experts(model)
    fused, factors = _fused(model)
    arrays = {PREFIX + name: array for name, array in tensors(model, LoraWeight) if name not in factors}
    arrays |= {PREFIX + name: array for name, array in factors.items()}
    saved = set()
    for _, variable in declared(model) if whole_modules else ():
        if isinstance(variable, Weight) and variable.get_metadata().get("trainable", False):
            role = variable.get_metadata("role")
            saved.add(MODULES.get(role) or variable.get_metadata("hf").removesuffix(".weight").rpartition(".")[2])
            arrays |= {PREFIX + name: hf_value(variable, i) for i, name in enumerate(hf_names(variable))}
    tied = model.spec.tied and "embed_tokens" in saved
    if tied:                                 # PEFT takes a tied head without a tensor of its own for the base's
        arrays[PREFIX + "lm_head.weight"] = arrays[PREFIX + "model.embed_tokens.weight"]
    lora = next(module.lora for _, module in linear_layers(model) if module.lora is not None)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "target_modules": sorted(_short_names(model)),
        # The scale of a pair is that of its parts.
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: (math.sqrt(count) if lora.rslora else count) * lora.alpha for name, count in fused.items()},
        "modules_to_save": sorted(saved) or None, "ensure_weight_tying": tied,
    }
    layout = safetensors.layout(arrays.items())
    safetensors.write(folder / WEIGHTS, layout, lambda name: arrays[name])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def _check_experts(model) -> None:
    """transformers 5 holds the experts of a layer together, gate and up as one; PEFT translates the factors of each, and takes
    everything named like a projection of an expert to be one; not of qwen2_moe, nor where they lie together on disk, too."""
    if model.spec.moe is None:
        return
    family, (gate, up, _) = model.spec.family, model.spec.moe.projections
    adapted = sorted({name for name, linear in linear_layers(model) if linear.lora is not None})
    experts = {name.rpartition(".")[2] for name in adapted if ".experts." in name}
    others = [name for name in adapted if name.rpartition(".")[2] in model.spec.moe.projections and ".experts." not in name]
    untranslated = family == "qwen2_moe" or model.spec.moe.fused
    if untranslated and experts:
        refused = f"PEFT does not load factors of the experts of a {family} model"
    elif not untranslated and others:
        refused = f"PEFT takes {others[0]} of a {family} model for a part of its experts"
    elif (gate in experts) != (up in experts):
        refused = f"PEFT adapts {gate} and {up} of experts together or not at all, and lora.targets names one of them"
    else:
        return
    raise ConfigError(f"an adapter cannot be written: {refused}; export with --format=merged")


def _fused(model) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Layers of ours that are rows of one in HF are adapted there by one pair: A of all of them, one below the other, and a
    B with theirs as blocks. Returns how many such layers each has by its name, and the factors by theirs."""
    counts, parts, factors = {}, {}, {}
    for _, linear in linear_layers(model):
        if linear.lora is not None and "part" in linear.kernel.get_metadata():
            for i, (a, b) in enumerate(zip(hf_names(linear.lora.a), hf_names(linear.lora.b))):
                parts.setdefault((a, b), []).append((linear, i))
    for (a, b), of in parts.items():
        rank = sum(linear.lora.rank for linear, _ in of)
        counts[_hf_dotted("", of[0][0])] = len(of)
        factors[a] = np.concatenate([hf_value(linear.lora.a, i) for linear, i in of])
        factors[b] = np.zeros((hf_shape(of[0][0].kernel)[0], rank), np.float32)
        for n, (linear, i) in enumerate(of):
            columns = slice(n * linear.lora.rank, (n + 1) * linear.lora.rank)
            factors[b][hf_part(linear.kernel)[1], columns] = hf_value(linear.lora.b, i)
    return counts, factors


def _hf_dotted(name: str, linear) -> str:
    """The dotted name of a linear layer in HF, where several of ours may be one."""
    hf = linear.kernel.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
    return ".".join(part for part in (name.rpartition(".")[0], hf) if part)


def _short_names(model) -> set[str]:
    """Names that PEFT, which matches by suffix, takes for exactly the adapted layers."""
    every = [_hf_dotted(name, linear) for name, linear in linear_layers(model)]
    adapted = {_hf_dotted(name, linear) for name, linear in linear_layers(model) if linear.lora is not None}
    short = {name.rpartition(".")[2] for name in adapted}
    return short if all((name in adapted) == (name.rpartition(".")[2] in short) for name in every) else set(adapted)
