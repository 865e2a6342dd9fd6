"""What is quantized, and how: the formats of an export with quantized kernels, in the table
`FORMATS`.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from lljax.compression.layers import abstract_layer
from lljax.compression.methods import Settings
from lljax.compression.observe import linear_layers
from lljax.errors import ConfigError
from lljax.interop.huggingface import hf_shape
from lljax.interop.layouts import WRITERS, Scheme
from lljax.interop.layouts.write import GROUPS
from lljax.models.declare import declared, hf_names
from lljax.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class Format:
    """scheme: with the usual group. methods, layouts: those that serve it, the usual one first."""

    scheme: Scheme
    methods: tuple[str, ...]
    layouts: tuple[str, ...]


FORMATS = {
    "w4a16": Format(Scheme(4), ("gptq", "awq", "rtn"), ("compressed-tensors", "gptq", "awq")),
    "w8a16": Format(Scheme(8), ("rtn", "gptq", "awq"), ("compressed-tensors", "gptq")),
    "fp8": Format(Scheme(8, kind="float", group=-1), ("rtn",), ("compressed-tensors",)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized. method: a key of `lljax.compression.methods.METHODS`. layout: a key
    of `lljax.interop.layouts.WRITERS`. search: see `Settings`.
    """

    method: str
    layout: str
    scheme: Scheme
    search: bool = False

    def settings(self, model_dtype: Any) -> Settings:
        stored = np.dtype(model_dtype), WRITERS[self.layout].scale_dtype(model_dtype)
        return Settings(self.scheme, stored, self.search)


def make_recipe(
    format: str, *, method: str | None, layout: str | None, group: int | None, search: bool
) -> Recipe:
    """None: what is usual for the format.

    Raises:
      ConfigError: the format, the method, the layout and the group do not go together.
    """
    row = FORMATS[format]
    method, layout = method or row.methods[0], layout or row.layouts[0]
    for flag, value, legal in (("method", method, row.methods), ("layout", layout, row.layouts)):
        if value not in legal:
            raise ConfigError(
                f"--{flag}={value} with --format={format}: it takes {', '.join(legal)}"
            )
    scheme = row.scheme
    if layout == "awq":  # the only layout whose readers want zero points
        scheme = dataclasses.replace(scheme, symmetric=False)
    if group is not None and (group < -1 or group == 0):
        raise ConfigError(f"--group={group}: a number of inputs, or -1 for all of an output")
    if group is not None:
        scheme = dataclasses.replace(scheme, group=group)
    if reason := WRITERS[layout].refuses(scheme):
        raise ConfigError(f"--format={format} --layout={layout} --group={scheme.group}: {reason}")
    return Recipe(method, layout, scheme, search)


@dataclasses.dataclass(frozen=True)
class Modules:
    """What readers of the layout are told of the modules. config: config.json's
    quantization_config. files: other JSON files that they want.
    """

    config: dict[str, Any]
    files: dict[str, dict[str, Any]]


def modules_of(spec: DecoderSpec, recipe: Recipe) -> Modules:
    """What a recipe does with the modules of a model.

    Raises:
      ConfigError: the layout cannot hold a kernel of the model.
    """
    writer, quantized, dense = WRITERS[recipe.layout], [], []
    for number in range(spec.L):
        for variable, refused in _kernels(spec, number):
            names = [name.removesuffix(".weight") for name in hf_names(variable)]
            if refused:
                dense += names
                continue
            *lead, out, rows = hf_shape(variable)
            if lead:
                raise ConfigError(
                    f"--layout={recipe.layout}: {spec.family} keeps the experts of a layer in one "
                    f"tensor ({names[0]}), and the layout holds matrices: use --format=merged"
                )
            if reason := writer.refuses_shape(out, rows, recipe.scheme):
                raise ConfigError(f"{names[0]}: {reason}{_other_group(spec, recipe)}")
            quantized += names
    quantized, dense = list(dict.fromkeys(quantized)), ["lm_head", *dict.fromkeys(dense)]
    return Modules(
        writer.config(recipe.scheme, quantized, dense),
        writer.files(recipe.scheme, quantized, dense),
    )


def warn_of_few(spec: DecoderSpec, tokens: int) -> None:
    """Logs a warning if there are fewer calibration tokens than inputs of some kernel."""
    widest = max(shape[-1] for shape in _shapes(spec))
    if tokens < widest:
        logging.warning(
            "the calibration rows have %d tokens, fewer than the %d inputs of a kernel, so that "
            "the errors on them say little: name more documents with --data, or raise --rows",
            tokens,
            widest,
        )


def stays_dense(name: str) -> bool:
    """Whether a linear layer of a decoder layer is never quantized: the gate of a shared expert has
    one output.
    """
    return name == "mlp.shared_gate"


def _kernels(spec: DecoderSpec, number: int) -> Iterator[tuple[Any, bool]]:
    """(kernel, whether it stays dense) of the linear layers and routers of a layer."""
    layer = abstract_layer(spec, number)
    for name, linear in linear_layers(layer).items():
        yield linear.kernel, stays_dense(name)
    for _, variable in declared(layer):
        if variable.get_metadata("role") == "router" and len(variable.get_value().shape) == 2:
            yield variable, True


def _shapes(spec: DecoderSpec) -> Iterator[tuple[int, ...]]:
    """The shapes of all quantized kernels, in HF orientation."""
    for number in range(spec.L):
        for variable, refused in _kernels(spec, number):
            if not refused:
                yield hf_shape(variable)


def _other_group(spec: DecoderSpec, recipe: Recipe) -> str:
    """Advice to take a group that divides all widths; an empty text if none does."""
    rows = {shape[-1] for shape in _shapes(spec)}
    fits = [group for group in GROUPS if group > 0 and all(row % group == 0 for row in rows)]
    if recipe.scheme.group == -1 or not fits:
        return ""
    return f": use --group={max(fits)}"
