"""The model that a configuration describes: the base's spec with its RoPE stretched, adapters
attached, weights loaded.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lljax.config import Config
from lljax.errors import ConfigError, ModelError
from lljax.interop.adapter_init import ResidualBase, starts_from_base
from lljax.interop.base import Base
from lljax.interop.folder import read_json
from lljax.interop.huggingface import load_weights
from lljax.interop.layouts import form_of
from lljax.interop.open import open_base, open_config
from lljax.interop.peft import load_adapter, under_adapter, unties_head
from lljax.models import fp8, lora, quantize, rope
from lljax.models.declare import declared, dtype_of
from lljax.models.decoder import Decoder, can_share_residuals
from lljax.models.families import FAMILIES, family_of, rope_fields, spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.linear import Linear
from lljax.models.rope import RopeSpec
from lljax.models.spec import DecoderSpec, repeats
from lljax.parallel import sharding


def open_run_base(config: Config) -> Base:
    """The base of a run. If the run continues an adapter: the base as that adapter takes it, see
    lljax.interop.peft.under_adapter.

    Raises:
      ModelError: the base or the adapter is missing, or cannot be read.
    """
    base = open_base(config.model.path, config.model.revision)
    return under_adapter(base, config.lora.adapter) if config.lora.adapter else base


def open_run_config(config: Config) -> dict[str, Any]:
    """The config.json of `open_run_base`; nothing else of a hub id is downloaded."""
    hf_config = open_config(config.model.path, config.model.revision)
    unties = config.lora.adapter and unties_head(hf_config, config.lora.adapter)
    return hf_config | {"tie_word_embeddings": False} if unties else hf_config


def adapted_spec(base: Base, adapter: Path) -> DecoderSpec:
    """The spec of the base under the RoPE of the adapter: its rope.json, which lljax writes beside
    it, if there is one.

    Raises:
      ModelError: rope.json holds no RoPE of this base.
    """
    config, path = under_adapter(base, adapter).config, Path(adapter) / "rope.json"
    if not path.is_file():
        return spec_from_hf(config)
    entries = read_json(path)
    for field in entries.keys() - rope_fields(family_of(config)):
        raise ModelError(f"{path}: {field} is no field of a RoPE")
    try:
        return spec_from_hf(config | entries)
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def rope_change_warning(spec: DecoderSpec, base: Base, adapter: str) -> str:
    """A warning if a run continues an adapter under another RoPE than it was trained under; else
    an empty text.
    """
    before = adapted_spec(base, Path(adapter)).rope
    if not (Path(adapter) / "rope.json").is_file() or before == spec.rope:
        return ""
    trained, now = (
        f"{rope.type} x{rope.factor:g} over {rope.original_length:,} tokens"
        for rope in (before, spec.rope)
    )
    return (
        f"lora.adapter={adapter} was trained under {trained} (its rope.json) and goes on under "
        f"{now}: set context.rope.type and context.rope.factor to keep it as it was"
    )


def extended_spec(hf_config: dict, context: Config) -> DecoderSpec:
    """The base's spec, with its RoPE changed according to `config.context`.

    Raises:
      ConfigError: a kept RoPE does not reach context.length.
    """
    spec = spec_from_hf(hf_config)
    if context.rope.type == "keep" and context.length > spec.max_length:
        raise ConfigError(
            f"context.length={context.length} exceeds the base's {spec.max_length} tokens and "
            "context.rope.type='keep' does not stretch it: use yarn, or linear or dynamic"
        )
    factor = context.rope.factor
    if isinstance(factor, str) and factor != "auto":  # from the command line
        factor = float(factor)
    return stretched(spec, type=context.rope.type, factor=factor, length=context.length)


def stretched(spec: DecoderSpec, *, type: str, factor: float | str, length: int) -> DecoderSpec:
    """`spec` with its RoPE stretched to read `length` tokens, see lljax.models.rope.extend.

    Layers with another RoPE (`more_ropes`) keep it. If RoPE rotates chunked layers alone, it never
    compares tokens further apart than a chunk, and "auto" leaves it unchanged.

    Raises:
      ConfigError: the base cannot be extended in this way, or nothing could load the result.
    """
    extended = rope.extend(
        spec.rope, type=type, factor=factor, length=length, max_length=spec.max_length
    )
    if extended == spec.rope:
        return spec
    if factor == "auto" and all(layer.chunked for layer in spec.layers if layer.rope is not None):
        return dataclasses.replace(spec, max_length=length)
    _check_loadable(spec, type)
    for local in spec.more_ropes:
        if not rope.KINDS[local.type].reads_max_length:
            continue
        raise ConfigError(
            f"context.rope.type={type!r}: the sliding layers of this base have a {local.type} "
            "RoPE, whose original length would change, too; use context.rope.type='keep'"
        )
    _warn_of_changes(spec.rope, extended)
    return dataclasses.replace(spec, rope=extended, max_length=length)


def _check_loadable(spec: DecoderSpec, type: str) -> None:
    """Refuses a kind of RoPE that transformers does not load with this family."""
    loadable = FAMILIES[spec.family].rope_kinds
    if type in loadable:
        return
    usable = spec.rope.type if spec.rope.type in loadable else "keep"
    raise ConfigError(
        f"context.rope.type={type!r}: transformers reads a {spec.family} model with no RoPE but "
        f"{', '.join(loadable)}, so nothing could load the trained model; use "
        f"context.rope.type={usable!r}"
    )


def _warn_of_changes(before: RopeSpec, after: RopeSpec) -> None:
    """Logs fields of the base's RoPE that are dropped, or that stay although the factor grows."""
    if dropped := rope.dropped_fields(before, after):
        keeps = f"; context.rope.type={before.type!r} keeps them"
        logging.warning(
            "context.rope.type=%r replaces the %s scaling of the base, and its %s are lost%s",
            after.type,
            before.type,
            ", ".join(dropped),
            keeps if before.type in rope.EXTENDABLE else "",
        )
    elif after.attention_factor is not None:
        logging.warning(
            "the base fixes attention_factor=%s, which stays as the factor grows from %g to %g",
            after.attention_factor,
            before.factor,
            after.factor,
        )


def abstract_model(config: Config, hf_config: dict) -> Decoder:
    """The decoder of a run with its adapters attached and its trainable Variables marked; no values
    yet.

    Raises:
      ConfigError: memory.layers_per_residual does not fit the layers; as `extended_spec` and
        lljax.models.lora.attach.
    """
    spec = extended_spec(hf_config, config.context)
    _check_residuals(spec, config.memory.layers_per_residual)
    model = Decoder(spec)
    if config.train_type == "full":
        lora.mark_trainable(model)
    else:
        attach_adapters(model, config)
    form, dtype = form_of(config.model.quantize, hf_config), jnp.dtype(config.model.dtype)
    if form:
        _quantize(model, ("kernel",), lambda rows: form, dtype)
    if config.optimizer.name == "q_galore":
        _quantize(
            model,
            ("kernel", "embed", "head"),
            lambda rows: quantize.integer_form(8, rows),
            dtype,
            trainable=True,
        )
    _set_matmul(model, config.model.matmul)
    return model


def _check_residuals(spec: DecoderSpec, layers: int) -> None:
    """Refuses a number of layers per residual that does not divide the layers."""
    if can_share_residuals(spec.layers, layers):
        return
    shape = " + ".join(f"{times} x {len(pattern)}" for _, pattern, times in repeats(spec.layers))
    usable = [n for n in range(1, spec.L + 1) if can_share_residuals(spec.layers, n)]
    raise ConfigError(
        f"memory.layers_per_residual={layers} does not divide the {spec.L} layers of the model, "
        f"which come as {shape} (times x pattern): use one of {', '.join(map(str, usable))}"
    )


def attach_adapters(model: Decoder, config: Config) -> None:
    """Gives a model the adapters that `config.lora` describes, see lljax.models.lora.attach."""
    lora.attach(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        rslora=config.lora.rslora,
        dropout=config.lora.dropout,
        dora=config.lora.dora,
        init=config.lora.init,
        seed=config.seed,
        rank_pattern=config.lora.rank_pattern,
        alpha_pattern=config.lora.alpha_pattern,
        also_train=config.lora.also_train,
    )


def _set_matmul(model: Decoder, matmul: str) -> None:
    """Makes the linear layers of a model multiply in fp8, if `model.matmul` says so."""
    for _, linear in lora.linear_layers(model) if matmul == "fp8" else ():
        if type(linear) is Linear:  # experts have a grouped product
            linear.dot = fp8.fp8_dot


def _quantize(
    model: Decoder,
    roles: tuple[str, ...],
    form_for: Callable[[int], quantize.Form],
    dtype: jnp.dtype,
    trainable: bool = False,
) -> None:
    """Makes weights of an abstract model quantized: of these roles, trainable ones or frozen ones.

    form_for(inputs): the Form of a weight with so many inputs.
    """
    for _, variable in declared(model):
        metadata = variable.get_metadata()
        if metadata.get("role") in roles and metadata.get("trainable", False) == trainable:
            shape = variable.get_value().shape
            variable.set_value(quantize.abstract_quantized(shape, form_for(shape[-2]), dtype))


def placed_model(config: Config, hf_config: dict, mesh: Mesh) -> Decoder:
    """`abstract_model` with the dtype and the sharding on `mesh` of every value: enough to compile
    with.
    """
    if config.model.matmul == "fp8":
        fp8.check(device.device_kind for device in mesh.devices.flat)
    model = abstract_model(config, hf_config)
    for _, variable in declared(model):
        value = variable.get_value()
        if not isinstance(value, quantize.Quantized):
            dtype = dtype_of(variable, jnp.dtype(config.model.dtype))
            value = jax.ShapeDtypeStruct(value.shape, dtype)
        variable.set_value(
            jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                value,
                _sharding(variable, mesh),
            )
        )
    return model


def build_model(config: Config, base: Base, mesh: Mesh) -> Decoder:
    """The decoder of a run, with its values on `mesh`."""
    model = abstract_model(config, base.config)
    fill(model, config, base, mesh)
    return model


def fill(model: Decoder, config: Config, base: Base, mesh: Mesh) -> dict[str, int]:
    """Puts the values of a run into its abstract model: of the base, of `lora.adapter`, and fresh
    ones elsewhere. Returns the checksums of the tensors that it read, see `load_weights`.
    """
    dtype, sums = jnp.dtype(config.model.dtype), {}

    def shardings(variable: nnx.Variable):
        return _sharding(variable, mesh)

    if starts_from_base(model):
        residual = ResidualBase(base, model)
        sums = load_weights(model, residual, dtype=dtype, shardings=shardings)
        residual.give_factors(shardings)
    elif config.model.init == "pretrained":
        sums = load_weights(model, base, dtype=dtype, shardings=shardings)
    if config.lora.adapter:
        load_adapter(model, config.lora.adapter, shardings=shardings)
    deviation = base.config.get("initializer_range", 0.02)
    initialize(model, config.seed, deviation=deviation, dtype=dtype, shardings=shardings)
    return sums


def load_base(
    base: Base,
    spec: DecoderSpec,
    dtype: Any,
    quantize: str = "none",
    matmul: str = "default",
    layout: sharding.Layout | None = None,
) -> Decoder:
    """The base alone under `spec`, to compare with or to generate from.

    quantize, matmul: values of `model.quantize` and `model.matmul`. layout: how the model lies on
    a mesh; None for one device.
    """
    model = Decoder(spec)
    compute_with(model, base, dtype, quantize, matmul)
    load_weights(model, base, dtype=dtype, shardings=sharding_of(layout))
    return model


def compute_with(model: Decoder, base: Base, dtype: Any, quantize: str, matmul: str) -> None:
    """Makes the kernels of an abstract model as in a run with these values of `model.quantize` and
    `model.matmul`.
    """
    _set_matmul(model, matmul)
    if form := form_of(quantize, base.config):
        _quantize(model, ("kernel",), lambda rows: form, dtype)


def generation_layout(spec: DecoderSpec) -> sharding.Layout | None:
    """The layout of a model that generates and does not train: its heads on as many of this
    process's devices as divide them; None for one device.
    """
    devices = jax.local_devices()
    parts = math.gcd(spec.N, spec.kv_parts, len(devices))
    if parts == 1:
        return None
    return sharding.Layout(sharding.make_mesh(tensor=parts, devices=devices[:parts]))


def sharding_of(layout: sharding.Layout | None) -> Callable | None:
    """The sharding of a Variable's value under a layout, as a function; None for no layout."""
    return layout and (lambda variable: _sharding(variable, layout.mesh))


def mesh_of(mesh: Config, devices: Sequence | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, over `devices` or all devices."""
    return sharding.make_mesh(**{axis: mesh[axis] for axis in sharding.AXES}, devices=devices)


def move(model: Decoder, mesh: Mesh) -> None:
    """Moves the values of a model onto `mesh`."""
    for _, variable in declared(model):
        value = jax.tree.map(sharding.put, variable.get_value(), _sharding(variable, mesh))
        variable.set_value(value)


def _sharding(variable: nnx.Variable, mesh: Mesh):
    return sharding.value_sharding(mesh, variable.get_metadata("axes"), variable.get_value())
