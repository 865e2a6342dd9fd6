"""The methods that round the kernels of a decoder layer, in the table `METHODS`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lljax.compression import awq, gptq
from lljax.compression.observe import Observed, Sums, linear_layers
from lljax.compression.rounding import Rounded, Stored, output_error, round_to_nearest
from lljax.interop.layouts import Codes, Scheme
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.linear import Linear, RMSNorm
from lljax.models.moe import ExpertLinear, MoE


@dataclasses.dataclass(frozen=True)
class Settings:
    """scheme: of the codes. stored: see `Stored`. search: whether the scale of a group is searched
    for, or taken from its largest weight.
    """

    scheme: Scheme
    stored: Stored
    search: bool

    @property
    def rounding(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "stored": self.stored, "search": self.search}


class Kernel(NamedTuple):
    """A rounded kernel, in host memory. expert: its number, None if it belongs to none.

    error: see `output_error`; None if nothing was observed. note: what went otherwise than it
    should, for the user; or an empty text.
    """

    expert: int | None
    codes: Codes
    error: float | None
    note: str = ""


Kernels = dict[str, list[Kernel]]  # by name within the layer


def round_layer(
    layer: DecoderLayer, quantized: set[str], observed: Observed, settings: Settings
) -> Kernels:
    """Rounding to nearest; `observed` is for the errors alone and may be empty."""
    return _rounded(layer, quantized, observed, settings, _nearest)


def gptq_layer(
    layer: DecoderLayer, quantized: set[str], observed: Observed, settings: Settings
) -> Kernels:
    """See lljax.compression.gptq."""
    return _rounded(layer, quantized, observed, settings, _gptq)


def awq_layer(
    layer: DecoderLayer, quantized: set[str], observed: Observed, settings: Settings
) -> Kernels:
    """See lljax.compression.awq. Changes the norms and kernels of `layer` that scales fold into."""
    scales: dict[str, jax.Array] = {}
    for before, after in folds(layer, observed):
        linears = [linear_layers(layer)[name] for name in after]
        sums = _sums_of(after[0], observed)
        assert sums is not None, "folds are of observed layers"
        if sums.gram.ndim == 3:  # of each expert
            each = [
                _scales(linears, Sums(*(x[e] for x in sums)), settings, e)
                for e in range(len(sums.gram))
            ]
            s = jnp.stack(each)
        else:
            s = _scales(linears, sums, settings)
        _fold(before, s)
        for linear in [*linears, *_dense_readers(layer, before)]:
            _scale_inputs(linear, s)
        scales |= dict.fromkeys(after, s)
    scaled = {
        names: _scaled(sums, scales[names[0]]) if names[0] in scales else sums
        for names, sums in observed.items()
    }
    return _rounded(layer, quantized, scaled, settings, _nearest)


@dataclasses.dataclass(frozen=True)
class Method:
    """run(layer, the linear layers to quantize, sums, settings): the rounded kernels of a layer.

    calibrated: whether it needs the sums.
    """

    run: Callable[[DecoderLayer, set[str], Observed, Settings], Kernels]
    calibrated: bool


METHODS = {
    "gptq": Method(gptq_layer, calibrated=True),
    "awq": Method(awq_layer, calibrated=True),
    "rtn": Method(round_layer, calibrated=False),
}


def _nearest(kernel: jax.Array, gram: Any, settings: Settings) -> tuple[Rounded, str]:
    return round_to_nearest(kernel, **settings.rounding), ""


def _gptq(kernel: jax.Array, gram: jax.Array, settings: Settings) -> tuple[Rounded, str]:
    rounded, damp = gptq.gptq(kernel, gram, **settings.rounding)
    if damp == gptq.DAMPS[0]:
        return rounded, ""
    how = "rounded to nearest" if damp is None else f"damped by {damp:g}"
    return rounded, f"its inputs depend on each other, so it was {how}"


def _rounded(
    layer: DecoderLayer,
    quantized: set[str],
    observed: Observed,
    settings: Settings,
    solve: Callable[[jax.Array, Any, Settings], tuple[Rounded, str]],
) -> Kernels:
    kernels: Kernels = {}
    for name, linear in linear_layers(layer).items():
        if name not in quantized:
            continue
        sums = _sums_of(name, observed)
        for expert, kernel in _matrices(linear):
            gram = sums and (sums.gram if sums.gram.ndim == 2 else sums.gram[expert])
            rounded, note = solve(kernel, gram, settings)
            error = None
            if gram is not None:
                error = float(output_error(kernel, rounded.dense(settings.scheme), gram))
            codes = rounded.to_codes(settings.scheme, settings.stored)
            kernels.setdefault(name, []).append(Kernel(expert, codes, error, note))
    return kernels


def _matrices(linear: Linear) -> Iterator[tuple[int | None, jax.Array]]:
    """The kernels [in, out] of a linear layer, with the number of their expert."""
    kernel = linear.kernel.get_value()
    if isinstance(linear, ExpertLinear):
        yield from enumerate(kernel)
    else:
        yield None, kernel


def _sums_of(name: str, observed: Observed) -> Sums | None:
    return next((sums for names, sums in observed.items() if name in names), None)


# ------------------------------------------------------------------- scales of AWQ
# What the scales of inputs fold into, and the linear layers that read it.
FOLDS: Mapping[str, tuple[str, ...]] = {
    "norm_before_mixer": (
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "q_a")),
        "self_attn.kv_a_proj_with_mqa",
    ),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "norm_before_mlp": tuple(
        f"mlp.{part}{name}_proj" for part in ("", "experts.", "shared.") for name in ("gate", "up")
    ),
    "mlp.before_mlp": ("mlp.dense.gate_proj", "mlp.dense.up_proj"),
    "mlp.norm": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
    "mlp.dense.up_proj": ("mlp.dense.down_proj",),
    "mlp.shared.up_proj": ("mlp.shared.down_proj",),
    "mlp.experts.up_proj": ("mlp.experts.down_proj",),
}


def folds(
    layer: DecoderLayer, observed: Observed
) -> Iterator[tuple[RMSNorm | Linear, tuple[str, ...]]]:
    """(the module that scales fold into, the linear layers that read it) of a layer.

    Left out: values that heads share, where widths differ (GQA), or that are normalized, and
    clamped experts.
    """
    linears = linear_layers(layer)
    for before, names in FOLDS.items():
        after = tuple(name for name in names if name in linears)
        try:
            module = attrgetter(before)(layer)
        except AttributeError:
            continue
        if module is None or not after:
            continue
        readers = next((found for found in observed if after[0] in found), ())
        clamped = (
            isinstance(layer.mlp, MoE)
            and before.startswith("mlp.experts")
            and layer.mlp.experts.clamp is not None
        )
        widths = isinstance(module, Linear) and (
            module.kernel.get_value().shape[-1] != linears[after[0]].kernel.get_value().shape[-2]
        )
        normalized = (
            before == "self_attn.v_proj" and getattr(layer.self_attn, "value_eps", None) is not None
        )
        # Another reader of the same input would read it scaled.
        others = set(readers) - set(after) - {"mlp.shared_gate"}
        if not (clamped or widths or normalized or others):
            yield module, after


def _dense_readers(layer: DecoderLayer, before: RMSNorm | Linear) -> list[Any]:
    """The modules besides linear layers of `FOLDS` that read a norm before experts."""
    if before is not layer.norm_before_mlp or not isinstance(layer.mlp, MoE):
        return []
    return [module for module in (layer.mlp.gate, layer.mlp.shared_gate) if module is not None]


def _scales(
    linears: list[Linear], sums: Sums, settings: Settings, expert: int | None = None
) -> jax.Array:
    kernels = [
        kernel
        for linear in linears
        for number, kernel in _matrices(linear)
        if expert is None or number == expert
    ]
    return awq.best_scales(tuple(kernels), sums.gram, sums.size, **settings.rounding)


def _fold(before: RMSNorm | Linear, s: jax.Array) -> None:
    """Divides the outputs of a norm or a linear layer by s [O], or [E, O] of experts."""
    if isinstance(before, RMSNorm):
        weight = before.weight.get_value()
        one = 1 if before.plus_one else 0
        before.weight.set_value(((weight + one) / s - one).astype(weight.dtype))
        return
    kernel = before.kernel.get_value()
    before.kernel.set_value((kernel / s[..., None, :]).astype(kernel.dtype))
    if before.bias is not None:
        bias = before.bias.get_value()
        before.bias.set_value((bias / s).astype(bias.dtype))


def _scale_inputs(module: Any, s: jax.Array) -> None:
    """Multiplies the weights of inputs by s: of a linear layer, or a router."""
    variable = module.kernel if isinstance(module, Linear) else module.weight
    weight = variable.get_value()
    variable.set_value((weight * s[..., :, None]).astype(weight.dtype))


def _scaled(sums: Sums, s: jax.Array) -> Sums:
    """The sums over inputs divided by s."""
    return Sums(sums.gram / (s[..., :, None] * s[..., None, :]), sums.size / s)
