"""Low-rank adapters: which linear layers get one, and which other weights train besides them.

Training embeddings and norms as well: LongLoRA, arXiv 2309.12307, section 3.3. Rank and alpha of
single layers, by patterns over their names, as in PEFT. The update itself is in
lljax.models.lora_layers.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from lljax.config.tree import ADAPTER_ROLES, WHOLE_ROLES
from lljax.errors import ConfigError
from lljax.models.declare import declared, hf_names
from lljax.models.linear import Linear
from lljax.models.lora_layers import Lora, LoraSettings, TableLora, column_norms
from lljax.models.patterns import matching
from lljax.models.quantize import Quantized, dequantize

TABLES = {"embed_tokens": "embed", "lm_head": "head"}  # matrices besides linear layers: their role


def attach(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    rslora: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    init: str = "default",
    seed: int = 0,
    rank_pattern: Iterable[tuple[str, int]] = (),
    alpha_pattern: Iterable[tuple[str, float]] = (),
    also_train: Iterable[str] = (),
) -> None:
    """Adds adapters to the layers that `targets` name, and marks the trainable weights: the factors
    and the roles of `also_train`.

    A target is the end of a name ("q_proj"), a regular expression over the dotted name
    ("self_attn\\.[qv]_proj"), with "model.layers.0." in front or not, or "all-linear". The model is
    changed in place; new Variables are abstract until initialized or loaded.

    init, seed: how the factors start, see lljax.models.adapter_init; for any init but "default" the
    base must be read through lljax.interop.adapter_init. rank_pattern, alpha_pattern: pairs
    (pattern, value), see `of_pattern`.

    Raises:
      ConfigError: a target, a role or a pattern matches nothing (the message lists the candidates),
        matches some but not all layers that are stacked in one array, or is no regular expression.
    """
    also_train = tuple(also_train)
    settings = LoraSettings(
        rank=rank,
        alpha=float(alpha),
        rslora=rslora,
        dropout=dropout,
        dora=dora,
        init=init,
        seed=seed,
    )
    rank_pattern, alpha_pattern = tuple(rank_pattern), tuple(alpha_pattern)
    candidates = [(name, weight) for name, weight, _ in adaptable(model)]
    names = _targeted(candidates, tuple(targets))
    adapted = [(name, weight) for name, weight in candidates if name in names]
    _check_patterns("rank_pattern", rank_pattern, adapted)
    _check_patterns("alpha_pattern", alpha_pattern, adapted)
    _check_kinds(model, names, settings, also_train)

    def settings_of(name: str, weight: nnx.Variable) -> LoraSettings:
        return dataclasses.replace(
            settings,
            rank=pattern_value(rank_pattern, name, weight, "rank_pattern", rank),
            alpha=float(pattern_value(alpha_pattern, name, weight, "alpha_pattern", alpha)),
        )

    for name, linear in linear_layers(model):
        if name in names:
            linear.lora = Lora(linear, settings_of(name, linear.kernel))
    for name, weight in adapted:
        if name in TABLES:
            setattr(model, f"{TABLES[name]}_lora", TableLora(weight, settings_of(name, weight)))
    _check_roles(model, also_train)
    mark_trainable(model, {*ADAPTER_ROLES, *also_train})


def _check_patterns(
    field: str, pairs: tuple[tuple[str, Any], ...], adapted: list[tuple[str, nnx.Variable]]
) -> None:
    for pattern, _ in pairs:
        if all(
            pattern_value([(pattern, True)], name, weight, field, None) is None
            for name, weight in adapted
        ):
            raise ConfigError(
                f"lora.{field}: {pattern!r} matches no adapted layer; there are "
                f"{', '.join(dict.fromkeys(name for name, _ in adapted))}"
            )


def _check_kinds(
    model: nnx.Module, adapted: list[str], settings: LoraSettings, also_train: tuple[str, ...]
) -> None:
    """Experts and tables take plain LoRA, and a table is either adapted or trained."""
    dora, init = settings.dora, settings.init
    experts = next((name for name in adapted if is_of_experts(name)), None)
    if experts and (dora or init != "default"):
        raise ConfigError(
            f"lora.targets: {experts!r}: experts take plain LoRA, and lora.dora={dora}, "
            f"lora.init={init!r}: name the other layers alone, or set lora.dora=False and "
            "lora.init='default'"
        )
    for name, role in TABLES.items():
        if name not in adapted:
            continue
        if getattr(model, "lm_head", None) is None:
            raise ConfigError(
                f"lora.targets: {name!r}: the head of this model is its embedding, and an adapter "
                "would part them: train the table whole with lora.also_train=('embed',)"
            )
        if role in also_train:
            raise ConfigError(
                f"lora.targets: {name!r} and lora.also_train: {role!r} both train the same table: "
                "drop one"
            )
        if dora or init != "default":
            raise ConfigError(
                f"lora.targets: {name!r} takes plain LoRA, and lora.dora={dora}, "
                f"lora.init={init!r}: leave it out, or set lora.dora=False and lora.init='default'"
            )


def _check_roles(model: nnx.Module, also_train: tuple[str, ...]) -> None:
    roles = {variable.get_metadata("role") for _, variable in declared(model)}
    for role in also_train:
        if role not in WHOLE_ROLES:
            raise ConfigError(f"lora.also_train: {role!r} is none of {', '.join(WHOLE_ROLES)}")
        if role not in roles:
            raise ConfigError(
                f"lora.also_train: this model has no separate {role!r} (its head is the "
                "embedding): name 'embed' instead"
            )


def is_of_experts(name: str) -> bool:
    """Whether a linear layer of this dotted name stands for experts (routed ones)."""
    return ".experts." in f".{name}"


def adaptable(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable, Lora | TableLora | None]]:
    """(name, weight, its adapter or None) of linear layers, embedding and untied head."""
    for name, linear in linear_layers(model):
        yield name, linear.kernel, linear.lora
    tables = (("embed_tokens", "embed", "embed_lora"), ("lm_head", "lm_head", "head_lora"))
    for name, table, adapter in tables:  # of a whole decoder; a single layer has none
        if getattr(model, table, None) is not None:
            yield name, getattr(model, table), getattr(model, adapter)


def start_magnitudes(
    model: nnx.Module, *, shardings: Callable[[nnx.Variable], Any] | None = None
) -> None:
    """Sets every magnitude without a value to the norms of its adapted kernel, so that the model
    stays as it is.
    """
    for _, linear in linear_layers(model):
        adapter = linear.lora
        if adapter is None or adapter.magnitude is None:
            continue
        magnitude = adapter.magnitude
        if not isinstance(magnitude.get_value(), jax.ShapeDtypeStruct):
            continue

        def norms(layer, scale=adapter.scale):
            kernel, a, b = layer
            if isinstance(kernel, Quantized):
                kernel = dequantize(kernel, kernel.dtype)
            return column_norms(kernel, a.astype(kernel.dtype), b.astype(kernel.dtype), scale)

        make = jax.jit(
            lambda *layers, norms=norms: jax.lax.map(norms, layers),
            out_shardings=shardings(magnitude) if shardings else None,
        )
        magnitude.set_value(make(linear.kernel.get_value(), adapter.a[...], adapter.b[...]))


def mark_trainable(model: nnx.Module, roles: Collection[str] | None = None) -> None:
    """Marks the Variables of these roles (None: all but buffers) as trainable, and all others as
    frozen.
    """
    for _, variable in declared(model):
        role = variable.get_metadata("role")
        variable.set_metadata(trainable=role != "scale" if roles is None else role in roles)


def is_trainable(path: tuple, variable: Any) -> bool:
    """An nnx filter: `nnx.split(model, is_trainable, ...)` gives (graphdef, trainable, frozen)."""
    return isinstance(variable, nnx.Variable) and variable.get_metadata().get("trainable", False)


def linear_layers(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(dotted name, module) of every linear layer that can be adapted, for example
    "self_attn.q_proj". A name comes once for each stack of layers, and stands for all experts of a
    layer.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            kernel = module.kernel.get_metadata()
            name = (
                kernel["hf"]
                .removesuffix(".weight")
                .removeprefix("model.layers.{layer}.")
                .replace(".{expert}", "")
            )
            yield (f"{name.rpartition('.')[0]}.{path[-1]}" if "part" in kernel else name), module


def matched_tables(targets: Iterable[str]) -> set[str]:
    """The keys of `TABLES` that these targets name."""
    texts = {
        "model.embed_tokens": "embed_tokens",
        "embed_tokens": "embed_tokens",
        "lm_head": "lm_head",
    }
    return {
        texts[text]
        for matched in matching(tuple(targets), tuple(texts), "lora.targets")
        for text in matched
    }


def _targeted(candidates: list[tuple[str, nnx.Variable]], targets: tuple[str, ...]) -> list[str]:
    """The names of the candidates that targets match, by the rules of PEFT: see `attach`."""
    layers: dict[str, list[str]] = {}  # name -> its full names, in all stacks of layers
    # by full name: the names that a target may match, also those of a tensor that fuses several
    texts_of: dict[str, tuple[str, ...]] = {}
    for name, weight in candidates:
        layers.setdefault(name, []).extend(_full_names(name, weight))
        of_tensor = hf_module(name, weight)
        for full, fused in zip(
            _full_names(name, weight), _full_names(of_tensor, weight), strict=True
        ):
            texts_of[full] = (name, full, of_tensor, fused)
    texts = tuple(dict.fromkeys(text for texts in texts_of.values() for text in texts))
    reached: set[str] = set()
    for target, matched in zip(targets, matching(targets, texts, "lora.targets"), strict=True):
        hits = {
            full
            for name, full_names in layers.items()
            for full in full_names
            if not matched.isdisjoint(texts_of[full])
            or (target == "all-linear" and name not in TABLES)
        }
        if not hits:
            raise ConfigError(
                f"lora.targets: {target!r} matches no linear layer; there are {', '.join(layers)}"
            )
        reached |= hits
    for full_names in layers.values():
        if 0 < len(reached.intersection(full_names)) < len(full_names):
            first = next(full for full in full_names if full in reached)
            other = next(full for full in full_names if full not in reached)
            raise ConfigError(
                f"lora.targets: {first} is matched and {other} is not, and layers are adapted all "
                "or none: leave the number out"
            )
    return [name for name, full_names in layers.items() if reached.issuperset(full_names)]


def hf_module(name: str, weight: nnx.Variable) -> str:
    """The name of the HF module of a layer: of "self_attn.q_proj" with fused projections,
    "self_attn.qkv_proj".
    """
    hf = weight.get_metadata("hf").removesuffix(".weight").rpartition(".")[2]
    return ".".join(part for part in (name.rpartition(".")[0], hf) if part)


def _full_names(name: str, weight: nnx.Variable) -> list[str]:
    """ "model.layers.0.self_attn.q_proj" and so on, of every layer in the stack of a weight."""
    if "layers" not in weight.get_metadata():
        return [weight.get_metadata("hf").removesuffix(".weight")]
    first, step = weight.get_metadata("layers")
    return [f"model.layers.{first + i * step}.{name}" for i in range(weight.get_value().shape[0])]


def pattern_value(
    pairs: Iterable[tuple[str, Any]],
    name: str,
    weight: nnx.Variable,
    field: str,
    default: Any,
) -> Any:
    """The value of the first of `pairs` (pattern, value) whose pattern, a regular expression,
    matches the end of the full name of `name` ("model.layers.0.self_attn.q_proj") from a dot on, as
    in PEFT; else `default`.

    Raises:
      ConfigError: no regular expression; or it matches some but not all layers of a stack, which
        are one array.
    """
    pairs = tuple(pairs)
    names = [hf.removesuffix(".weight") for hf in hf_names(weight)] if pairs else []
    if "part" in weight.get_metadata():  # of a fused layer, under its own name
        names = [f"{hf.rpartition('.')[0]}.{name.rpartition('.')[2]}" for hf in names]
    patterns = tuple(pattern for pattern, _ in pairs)
    matched_by = matching(patterns, tuple(names), f"lora.{field}", r"(.*\.)?")
    for (pattern, value), texts in zip(pairs, matched_by, strict=True):
        matched = [name in texts for name in names]
        if all(matched):
            return value
        if any(matched):
            raise ConfigError(
                f"lora.{field}: {pattern!r} matches {names[matched.index(True)]} and not "
                f"{names[matched.index(False)]}, and all layers have one rank and alpha: leave the "
                "number out"
            )
    return default
