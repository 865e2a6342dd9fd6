"""Writes the adapter of a model."""

import collections
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.adapter_init import ResidualBase, owns_kernel, starts_from_base
from lljax.interop.base import Base
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value
from lljax.interop.own_head import EMBED, HEAD
from lljax.interop.peft.tensors import MODULES, PREFIX, WEIGHTS
from lljax.models.declare import Weight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES
from lljax.models.families.family import Names
from lljax.models.lora import Lora, adaptable, hf_module, is_of_experts
from lljax.models.lora_layers import TableLora

Scale = tuple[int, float]  # rank and alpha
NORM = "model.norm"  # the last one; names of other modules end with its last word


class Adapted(NamedTuple):
    """A weight with an adapter, and the index of one of its HF tensors."""

    weight: nnx.Variable
    lora: Lora | TableLora
    index: int


def write_adapter(
    model: Decoder,
    folder: Path,
    *,
    base_name: str,
    base: Base | None = None,
    names: Names | None = None,
    whole_modules: bool = True,
) -> dict[str, Any]:
    """Writes the adapter of a model to an existing folder; returns its adapter_config.

    base: the base, needed if the factors started from it (lljax.models.adapter_init), or if DoRA
      adapts some of the layers that are one in HF.
    names: of the modules in the multimodal model to load the adapter into; None for the text model.
    whole_modules: with the embeddings, norms and heads that trained (`modules_to_save`); otherwise
      the factors alone.

    Raises:
      ConfigError: PEFT would read the factors of experts in another way.
    """
    _check_experts(model, multimodal=names is not None)
    arrays, scales = factors(model, base)
    saved = set()
    for _, variable in declared(model) if whole_modules else ():
        if isinstance(variable, Weight) and variable.get_metadata().get("trainable", False):
            name = variable.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
            saved.add(MODULES.get(variable.get_metadata("role")) or name)
            for i, name in enumerate(hf_names(variable)):
                arrays[PREFIX + name] = hf_value(variable, i)
    ties = model.spec.tied and MODULES["embed"] in saved
    if ties:  # without a tensor of its own, PEFT takes the base's for a tied head
        arrays[PREFIX + HEAD] = arrays[PREFIX + EMBED]
    lora = next(lora for _, _, lora in adaptable(model) if lora is not None)
    targets = _target_modules(model)
    if names is not None:
        # Its other parts have modules of the same names, so that these are named in full.
        arrays = {PREFIX + names.of(name.removeprefix(PREFIX)): arrays[name] for name in arrays}
        scales = {names.of(name): scale for name, scale in scales.items()}
        targets = set(scales)
        saved = {names.of(NORM) if name == NORM.rpartition(".")[2] else name for name in saved}
    rank, ranks = _pattern({name: rank for name, (rank, _) in scales.items()})
    alpha, alphas = _pattern({name: alpha for name, (_, alpha) in scales.items()})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.magnitude is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": ties,
    }
    layout = safetensors.layout(arrays.items())
    safetensors.write(folder / WEIGHTS, layout, lambda name: arrays[name])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def _check_experts(model: Decoder, *, multimodal: bool) -> None:
    """Refuses adapters of experts that PEFT would not load, or would load otherwise.

    transformers 5 holds the experts of a layer together, gate and up as one. PEFT translates the
    factors of single experts (`Family.peft_experts`), and takes every module named like a
    projection of an expert for one.
    """
    if model.spec.moe is None:
        return
    family, projections = model.spec.family, model.spec.moe.projections
    adapted = sorted({name for name, _, lora in adaptable(model) if lora is not None})
    experts = {name.rpartition(".")[2] for name in adapted if is_of_experts(name)}
    others = [
        name
        for name in adapted
        if name.rpartition(".")[2] in projections and not is_of_experts(name)
    ]
    gate, up, _ = projections
    translates = FAMILIES[family].peft_experts and not multimodal
    if not translates and experts:
        kind = "multimodal " if multimodal else ""
        reason = f"PEFT does not load factors of the experts of a {kind}{family} model"
    elif translates and others:
        reason = f"PEFT takes {others[0]} of a {family} model for a part of its experts"
    elif (gate in experts) != (up in experts):
        reason = (
            f"PEFT adapts {gate} and {up} of experts together or not at all, and lora.targets "
            "names one of them"
        )
    else:
        return
    raise ConfigError(f"an adapter cannot be written: {reason}; export with --format=merged")


def factors(model: Decoder, base: Base | None) -> tuple[dict[str, np.ndarray], dict[str, Scale]]:
    """The tensors of an adapter by name, and the rank and alpha of each adapted HF module by its
    name.

    Factors that started from the base get twice the rank: the trained factors and the negated first
    factors, side by side, belong on the original base. If several of our layers are rows of one
    layer in HF, one pair adapts it there: A stacks the layers' A, and B has their B as blocks.
    """
    started = None
    if starts_from_base(model):
        assert base is not None, "factors that started from the base need it"
        started = ResidualBase(base, model)
    modules: dict[str, list[Adapted]] = {}
    for _, weight, lora in adaptable(model):
        if lora is None:
            continue
        for i, name in enumerate(hf_names(weight)):
            modules.setdefault(name, []).append(Adapted(weight, lora, i))
    arrays, scales = {}, {}
    for name, parts in modules.items():
        weight, lora, i = parts[0]
        pairs = [_pair(name, part, started) for part in parts]
        a, b = np.concatenate([a for a, _ in pairs]), pairs[0][1]
        if "part" in weight.get_metadata():
            b = _block_b(parts, pairs)
        if lora.magnitude is not None:
            arrays[PREFIX + hf_names(lora.magnitude)[i]] = _magnitude(name, parts, base)
        arrays[PREFIX + hf_names(lora.a)[i]], arrays[PREFIX + hf_names(lora.b)[i]] = a, b
        growth = len(a) / lora.rank  # the scale alpha / rank, or alpha / sqrt(rank), stays
        alpha = lora.alpha * (math.sqrt(growth) if lora.rslora else growth)
        scales[name.removesuffix(".weight")] = (len(a), alpha)
    return arrays, scales


def _pair(
    name: str, adapted: Adapted, started: ResidualBase | None
) -> tuple[np.ndarray, np.ndarray]:
    """A [R, in] and B [out, R] of one layer, on the original base."""
    weight, lora, i = adapted
    a, b = hf_value(lora.a, i), hf_value(lora.b, i)
    if started is None or owns_kernel(lora):
        return a, b
    first_a, first_b = started.factors(name, hf_part(weight))
    return np.concatenate([a, first_a]), np.concatenate([b, -first_b], axis=1)


def _block_b(parts: list[Adapted], pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """B [out, R of all parts] of a HF layer: the B of every part in its rows and columns."""
    weight, first, _ = parts[0]
    whole = np.zeros((hf_shape(weight)[0], sum(len(a) for a, _ in pairs)), np.float32)
    column = 0
    for (part, lora, _), (_, b) in zip(parts, pairs, strict=True):
        end = column + b.shape[1]
        rows = hf_part(part)[1]  # of [..., outputs, inputs]
        whole[rows, column:end] = b * (lora.scale / first.scale)
        column = end
    return whole


def _magnitude(name: str, adapted: list[Adapted], base: Base | None) -> np.ndarray:
    """The DoRA magnitude [out] of a HF tensor; rows that nothing adapts keep their norms."""
    parts = []
    for _, lora, i in adapted:
        assert lora.magnitude is not None  # DoRA's, of all parts or none
        parts.append((hf_part(lora.magnitude), hf_value(lora.magnitude, i)))
    rows = hf_shape(adapted[0].weight)[0]
    if sum(len(part) for _, part in parts) == rows:
        whole = np.empty(rows, np.float32)
    else:
        assert base is not None, "rows that nothing adapts need the base"
        whole = np.linalg.norm(base.read(name).astype(np.float32), axis=1)
    for at, part in parts:
        whole[at] = part
    return whole


def _target_modules(model: Decoder) -> set[str]:
    """Names that PEFT, which matches by suffix, takes for exactly the adapted layers."""
    names = {hf_module(name, weight) for name, weight, _ in adaptable(model)}
    adapted = {
        hf_module(name, weight) for name, weight, lora in adaptable(model) if lora is not None
    }
    short = {name.rpartition(".")[2] for name in adapted}
    exact = all((name in adapted) == (name.rpartition(".")[2] in short) for name in names)
    return short if exact else adapted


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and other values by regular expressions of names.

    Raises:
      ConfigError: experts have several values.
    """
    of_experts = {value for name, value in values.items() if is_of_experts(name)}
    if len(of_experts) > 1:
        raise ConfigError(
            "an adapter cannot be written: PEFT gives all experts one rank and one alpha, and "
            "lora.rank_pattern or lora.alpha_pattern gives them several; export with "
            "--format=merged"
        )
    usual = next(iter(of_experts), None)
    usual = usual or collections.Counter(values.values()).most_common(1)[0][0]
    by_module: dict[str, dict[str, Any]] = {}  # a regex for all layers -> {regex of one: value}
    for name, value in values.items():
        regex = re.escape(name)
        every_layer = re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", regex)
        by_module.setdefault(every_layer, {})[regex] = value
    pattern = {}
    for every_layer, layers in by_module.items():
        if len(set(layers.values())) == 1:
            pattern[every_layer] = next(iter(layers.values()))
        else:
            pattern |= layers
    return usual, {regex: value for regex, value in pattern.items() if value != usual}
