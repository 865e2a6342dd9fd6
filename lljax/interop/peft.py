"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import collections
import contextlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.errors import ConfigError, ModelError, short
from lljax.interop import safetensors
from lljax.interop.adapter_init import StartedBase, owns_kernel, starts_from_base
from lljax.interop.folder import read_json
from lljax.interop.huggingface import hf_names, hf_part, hf_shape, hf_value
from lljax.interop.own_head import OwnHead
from lljax.models.declare import Weight, declared
from lljax.models.lora import TABLES, adaptable, attach, matched_tables, of_pattern
from lljax.models.spec import is_tied
from lljax.models.values import FLAG, LARGEST, WORD, Value, check, dict_of, list_of, optional, whole
from lljax.parallel.sharding import put

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# What changes the mathematics and is not read here, with the value that means "not used".
UNSUPPORTED = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layers_to_transform": (None, []),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    # pissa, olora, corda and loftq change the base's weights when they start.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
# Tables of the base that PEFT writes beside the factors of one of them.
BESIDE = (
    "model.embed_tokens.weight",
    "model.embed_tokens.base_layer.weight",
    "lm_head.weight",
    "lm_head.base_layer.weight",
)
# modules_to_save by role; norms have several names
MODULES = {"embed": "embed_tokens", "head": "lm_head"}


# What the fields of adapter_config.json that are read may hold.
ALPHA = Value(lambda x: type(x) in (int, float) and abs(x) <= LARGEST, "a number")
RANK = whole(1, 1 << 20)
NAMES = list_of(WORD)
FIELDS = {
    "peft_type": WORD,
    "r": RANK,
    "lora_alpha": ALPHA,
    "modules_to_save": optional(NAMES),
    "target_modules": Value(lambda x: WORD.holds(x) or NAMES.holds(x), "a word or a list of words"),
    "rank_pattern": optional(dict_of(RANK)),
    "alpha_pattern": optional(dict_of(ALPHA)),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "ensure_weight_tying": FLAG,
}


class AdapterConfig(NamedTuple):
    """The settings of an adapter, as lora.attach takes them. ties: a tied head and its embedding
    stay one table.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    also_train: tuple[str, ...]
    rank_pattern: tuple = ()  # (pattern, value) each, as lora.attach takes them
    alpha_pattern: tuple = ()
    dora: bool = False
    ties: bool = False

    def attach(self, model: nnx.Module) -> None:
        attach(model, **{name: value for name, value in self._asdict().items() if name != "ties"})


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of an adapter made here or elsewhere.

    Raises:
      ModelError: no adapter there, or one of a kind that is not supported.
    """
    path = Path(folder) / "adapter_config.json"
    c = read_json(path)
    check(
        {"peft_type": None, "r": None, "lora_alpha": None, "target_modules": None, **c},
        FIELDS,
        str(path),
    )
    if c["peft_type"] != "LORA":
        raise ModelError(f"{path}: peft_type is {short(c['peft_type'])}, and LORA is supported")
    for field, unused in UNSUPPORTED.items():
        if c.get(field) not in unused:
            raise ModelError(
                f"{path}: {field}={short(c[field])} is not supported; merge this adapter with PEFT and use the "
                "merged model as the base"
            )
    targets, saved = (
        c["target_modules"],
        {name.rpartition(".")[2] for name in c.get("modules_to_save") or ()},
    )
    roles = {role for role, name in MODULES.items() if name in saved}
    roles |= {"norm"} if any(name.endswith("norm") for name in saved) else set()
    for name in sorted(saved - set(MODULES.values())):
        if not name.endswith("norm"):
            raise ModelError(
                f"{path}: modules_to_save holds {short(name)}; embeddings, heads and norms are supported"
            )
    return AdapterConfig(
        rank=c["r"],
        alpha=float(c["lora_alpha"]),
        rslora=bool(c.get("use_rslora")),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        also_train=tuple(sorted(roles)),
        rank_pattern=tuple((c.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple(
            (name, float(alpha)) for name, alpha in (c.get("alpha_pattern") or {}).items()
        ),
        dora=bool(c.get("use_dora")),
        ties=bool(c.get("ensure_weight_tying")),
    )


@contextlib.contextmanager
def named(folder):
    """What is wrong with the settings of an adapter, as an error that names its file."""
    try:
        yield
    except ConfigError as error:
        raise ModelError(f"{folder}/adapter_config.json: {error}") from None


def parts_head(hf_config: dict, folder) -> bool:
    """Whether an adapter takes the head of a tied base and its embedding for two tables: PEFT wraps
    or adapts the one that is named and leaves the other as the base has it, unless
    `ensure_weight_tying`.

    Raises:
      ModelError: it adapts both by the same factors.
    """
    settings = read_adapter_config(folder)
    if not is_tied(hf_config):
        return False
    with named(folder):
        adapted = matched_tables(settings.targets)
    if not adapted and not {"embed", "head"} & set(settings.also_train):
        return False
    if settings.ties and adapted:
        raise ModelError(
            f"{folder}: ensure_weight_tying with {sorted(adapted)[0]!r} in target_modules is not supported; merge "
            "this adapter with PEFT and use the merged model as the base"
        )
    return not settings.ties


def under_adapter(base, folder):
    """`base` as an adapter sees it, see `parts_head`."""
    return OwnHead(base) if parts_head(base.config, folder) else base


def load_adapter(model: nnx.Module, folder, *, shardings=None) -> None:
    """Fills the factors and the trained base Variables of a model (adapters attached) from an
    adapter's folder.

    Raises:
      ModelError: a tensor is missing, left over, or has another shape; the model scales its factors
        in another way.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    if model.spec.tied and parts_head({"tie_word_embeddings": True}, folder):
        raise ModelError(
            f"{folder}: it trains the head of a tied base or its embedding alone, and this model has one table "
            "for both: open the base with lljax.interop.peft.under_adapter"
        )
    # shapes do not show these, and they change what the factors mean
    for name, weight, lora in adaptable(model):
        if lora is None:
            continue
        if "part" in weight.get_metadata():
            raise ModelError(
                f"{folder}: {name} is a part of {_hf_dotted(name, weight)}, whose one pair of factors is not "
                "that of its parts; merge this adapter with PEFT and use the merged model as the base"
            )
        alpha = of_pattern(config.alpha_pattern, name, weight, "alpha_pattern", config.alpha)
        if (lora.alpha, lora.rslora, lora.magnitude is not None) != (
            alpha,
            config.rslora,
            config.dora,
        ):
            raise ModelError(
                f"{folder}: the adapter has alpha={alpha}, rslora={config.rslora} and dora={config.dora}: set "
                "lora.alpha, lora.alpha_pattern, lora.rslora and lora.dora as it has them"
            )
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; adapters are read from safetensors only")
    file = safetensors.File(path)
    left = set(file.entries)
    for _, variable in declared(model):
        if not variable.get_metadata().get("trainable", False):
            continue
        names = [PREFIX + name for name in hf_names(variable)]
        if isinstance(variable, Weight) and names[0] not in file.entries:
            continue  # trained here from its base value on
        for name in names:
            if name not in file.entries:
                raise ModelError(f"{path}: tensor {name!r} is missing")
            if not jnp.issubdtype(file.entries[name][0], jnp.floating):
                raise ModelError(
                    f"{path}: tensor {name!r} is {file.entries[name][0]}, and factors are floating-point numbers"
                )
            if file.entries[name][1] != hf_shape(variable):
                raise ModelError(
                    f"{path}: tensor {name!r} has shape {file.entries[name][1]}, and the model has "
                    f"{hf_shape(variable)}: set lora.rank, lora.rank_pattern and lora.targets as in the adapter"
                )
        left -= set(names)
        layers = [np.asarray(file.read(name), np.float32) for name in names]
        layers = [layer.T if variable.get_metadata("transpose") else layer for layer in layers]
        value = np.stack(layers).reshape(variable.get_value().shape)
        variable.set_value(put(value, shardings(variable) if shardings else None))
    head, embed = (PREFIX + name for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if model.spec.tied and {head, embed} <= file.entries.keys():
        if not np.array_equal(file.read(head), file.read(embed)):
            raise ModelError(
                f"{path}: lm_head was trained apart from the embedding it is tied to; this model has no "
                "place for both"
            )
        left.discard(head)
    if any(lora is not None for name, _, lora in adaptable(model) if name in TABLES):
        left -= {PREFIX + name for name in BESIDE}
    if left:
        raise ModelError(
            f"{path}: {len(left)} tensors have no place in this configuration, such as {sorted(left)[0]!r}: "
            "name their modules in lora.targets or lora.also_train"
        )


def write_adapter(
    model: nnx.Module, folder: Path, *, base_name: str, base=None, whole_modules: bool = True
) -> dict:
    """Writes the adapter of a model to an existing folder; returns its adapter_config.

    base: the base, which is needed where the factors started from it (lljax.models.adapter_init),
      and where DoRA adapts some of the layers that are one in HF.
    whole_modules: with the embeddings, norms and heads that trained (`modules_to_save`), or the
      factors alone.

    Raises:
      ConfigError: PEFT would read the factors of experts in another way.
    """
    _check_experts(model)
    arrays, scales = _factors(model, base)
    saved = set()
    for _, variable in declared(model) if whole_modules else ():
        if isinstance(variable, Weight) and variable.get_metadata().get("trainable", False):
            role = variable.get_metadata("role")
            saved.add(
                MODULES.get(role)
                or variable.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
            )
            arrays |= {
                PREFIX + name: hf_value(variable, i) for i, name in enumerate(hf_names(variable))
            }
    tied = model.spec.tied and "embed_tokens" in saved
    if tied:  # PEFT takes a tied head without a tensor of its own for the base's
        arrays[PREFIX + "lm_head.weight"] = arrays[PREFIX + "model.embed_tokens.weight"]
    lora = next(lora for _, _, lora in adaptable(model) if lora is not None)
    (rank, ranks), (alpha, alphas) = (
        _pattern({name: scale[i] for name, scale in scales.items()}) for i in (0, 1)
    )
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
        "target_modules": sorted(_short_names(model)),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": tied,
    }
    layout = safetensors.layout(arrays.items())
    safetensors.write(folder / WEIGHTS, layout, lambda name: arrays[name])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def _check_experts(model) -> None:
    """transformers 5 holds the experts of a layer together, gate and up as one; PEFT translates the
    factors of each, and takes everything named like a projection of an expert to be one; not of
    qwen2_moe, nor where they lie together on disk, too.
    """
    if model.spec.moe is None:
        return
    family, (gate, up, _) = model.spec.family, model.spec.moe.projections
    adapted = sorted({name for name, _, lora in adaptable(model) if lora is not None})
    experts = {name.rpartition(".")[2] for name in adapted if ".experts." in name}
    others = [
        name
        for name in adapted
        if name.rpartition(".")[2] in model.spec.moe.projections and ".experts." not in name
    ]
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


def _factors(model, base) -> tuple[dict[str, np.ndarray], dict[str, tuple]]:
    """The tensors of an adapter by name, and the rank and alpha of each adapted HF module by its
    name.

    Where the factors started from the base they get twice the rank: the trained and the negated
      first ones side by side belong on the base as it was. Layers of ours that are rows of one in
      HF are adapted there by one pair: A of all of them, one below the other, and a B with theirs
      as blocks.
    """
    started = StartedBase(base, model) if starts_from_base(model) else None
    modules, arrays, scales = {}, {}, {}
    for _, weight, lora in adaptable(model):
        for i, name in enumerate(hf_names(weight)) if lora is not None else ():
            modules.setdefault(name, []).append((weight, lora, i))
    for name, of in modules.items():
        pairs = []
        for weight, lora, i in of:
            a, b = hf_value(lora.a, i), hf_value(lora.b, i)
            if started is not None and not owns_kernel(lora):
                first_a, first_b = started.factors(name, hf_part(weight))
                a, b = np.concatenate([a, first_a]), np.concatenate([b, -first_b], axis=1)
            pairs.append((a, b))
        weight, lora, i = of[0]
        a, b, magnitude = np.concatenate([a for a, _ in pairs]), pairs[0][1], lora.magnitude
        if "part" in weight.get_metadata():
            b, column = np.zeros((hf_shape(weight)[0], len(a)), np.float32), 0
            for (part, own, _), (_, own_b) in zip(of, pairs):
                b[hf_part(part)[1], column : column + own_b.shape[1]] = own_b * (
                    own.scale / lora.scale
                )
                column += own_b.shape[1]
        if magnitude is not None:
            arrays[PREFIX + hf_names(magnitude)[i]] = _magnitude(name, of, base)
        arrays[PREFIX + hf_names(lora.a)[i]], arrays[PREFIX + hf_names(lora.b)[i]] = a, b
        more = len(a) / lora.rank  # the scale alpha / rank, or alpha / sqrt(rank), stays
        scales[name.removesuffix(".weight")] = (
            len(a),
            lora.alpha * (math.sqrt(more) if lora.rslora else more),
        )
    return arrays, scales


def _magnitude(name: str, of, base) -> np.ndarray:
    """Of a HF tensor; rows of it that nothing adapts keep their norms."""
    parts = [(hf_part(lora.magnitude), hf_value(lora.magnitude, i)) for _, lora, i in of]
    rows = hf_shape(of[0][0])[0]
    if sum(len(part) for _, part in parts) == rows:
        whole = np.empty(rows, np.float32)
    else:
        whole = np.linalg.norm(base.read(name).astype(np.float32), axis=1)
    for at, part in parts:
        whole[at] = part
    return whole


def _hf_dotted(name: str, weight) -> str:
    """The dotted name of a layer in HF, where several of ours may be one."""
    hf = weight.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
    return ".".join(part for part in (name.rpartition(".")[0], hf) if part)


def _short_names(model) -> set[str]:
    """Names that PEFT, which matches by suffix, takes for exactly the adapted layers."""
    every = [_hf_dotted(name, weight) for name, weight, _ in adaptable(model)]
    adapted = {
        _hf_dotted(name, weight) for name, weight, lora in adaptable(model) if lora is not None
    }
    short = {name.rpartition(".")[2] for name in adapted}
    return (
        short
        if all((name in adapted) == (name.rpartition(".")[2] in short) for name in every)
        else set(adapted)
    )


def _pattern(values: dict) -> tuple[float, dict]:
    """The value that most modules have, and those of the others by what matches their names.

    Raises:
      ConfigError: experts have several values.
    """
    of_experts = {value for name, value in values.items() if ".experts." in name}
    if len(of_experts) > 1:
        raise ConfigError(
            "an adapter cannot be written: PEFT gives all experts one rank and one alpha, and lora.rank_pattern "
            "or lora.alpha_pattern gives them several; export with --format=merged"
        )
    usual = (
        next(iter(of_experts), None) or collections.Counter(values.values()).most_common(1)[0][0]
    )
    alike = {}  # what matches a name in all layers -> the names and their values
    for name, value in values.items():
        alike.setdefault(re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)), {})[
            re.escape(name)
        ] = value
    others = {}
    for regex, names in alike.items():
        others |= {regex: next(iter(names.values()))} if len(set(names.values())) == 1 else names
    return usual, {regex: value for regex, value in others.items() if value != usual}
