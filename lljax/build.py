"""The model that a configuration describes: the base's spec with its RoPE stretched, adapters
attached, weights in.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lljax.errors import ConfigError, ModelError
from lljax.interop.adapter_init import StartedBase, starts_from_base
from lljax.interop.folder import read_json
from lljax.interop.huggingface import load_weights
from lljax.interop.layouts import form_of
from lljax.interop.open import open_base, open_config
from lljax.interop.peft import load_adapter, parts_head, under_adapter
from lljax.models import fp8, lora, quantize, rope
from lljax.models import spec as specs
from lljax.models.declare import declared, dtype_of
from lljax.models.decoder import Decoder, share_residuals
from lljax.models.initialise import initialise
from lljax.models.linear import Linear
from lljax.models.spec import DecoderSpec, repeats
from lljax.parallel import sharding


def open_run_base(config):
    """The base of a run, as the adapter that the run continues from sees it.

    Raises:
      ModelError: there is none, or it cannot be read; or the adapter.
    """
    base = open_base(config.model.path, config.model.revision)
    return under_adapter(base, config.lora.adapter) if config.lora.adapter else base


def open_run_config(config) -> dict:
    """The config.json of `open_run_base`; of a hub id nothing else is downloaded."""
    hf_config = open_config(config.model.path, config.model.revision)
    parted = config.lora.adapter and parts_head(hf_config, config.lora.adapter)
    return hf_config | {"tie_word_embeddings": False} if parted else hf_config


def adapted_spec(base, adapter: Path) -> DecoderSpec:
    """The spec of the base under the RoPE in the rope.json that lljax writes beside an adapter,
    where there is one.

    Raises:
      ModelError: rope.json holds what is no RoPE of this base.
    """
    config, path = under_adapter(base, adapter).config, Path(adapter) / "rope.json"
    if not path.is_file():
        return specs.from_hf(config)
    given = read_json(path)
    for field in given.keys() - specs.ROPE_FIELDS:
        raise ModelError(f"{path}: {field} is no field of a RoPE")
    try:
        return specs.from_hf(config | given)
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def rope_unlike_the_adapters(spec: DecoderSpec, base, adapter: str) -> str:
    """A line that says so if a run continues an adapter under another RoPE than it was trained
    under; or an empty text.
    """
    before = adapted_spec(base, Path(adapter)).rope
    if not (Path(adapter) / "rope.json").is_file() or before == spec.rope:
        return ""
    told = [
        f"{rope.type} x{rope.factor:g} over {rope.original_length:,} tokens"
        for rope in (before, spec.rope)
    ]
    return (
        f"lora.adapter={adapter} was trained under {told[0]} (its rope.json) and goes on under {told[1]}: set "
        "context.rope.type and context.rope.factor to keep it as it was"
    )


def extended_spec(hf_config: dict, context) -> DecoderSpec:
    """The base's spec, its RoPE changed as `config.context` says.

    Raises:
      ConfigError: a kept RoPE does not reach context.length.
    """
    spec = specs.from_hf(hf_config)
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

    Layers with a RoPE of their own (`more_ropes`) keep it. If RoPE turns chunked layers alone, it
    never compares tokens further apart than a chunk, and "auto" leaves it as it is.
    """
    extended = rope.extend(
        spec.rope, type=type, factor=factor, length=length, max_length=spec.max_length
    )
    if extended == spec.rope:
        return spec
    if factor == "auto" and all(layer.chunked for layer in spec.layers if layer.rope is not None):
        return dataclasses.replace(spec, max_length=length)
    if spec.family == "phi3" and extended.type != "longrope":
        usable = "longrope" if spec.rope.type == "longrope" else "keep"
        raise ConfigError(
            f"context.rope.type={type!r}: transformers reads a phi3 model with no RoPE but its own, so nothing "
            f"could load what was trained; use context.rope.type={usable!r}"
        )
    if any(local.type == "dynamic" for local in spec.more_ropes):
        raise ConfigError(
            f"context.rope.type={type!r}: the sliding layers of this base have a dynamic RoPE, whose original "
            "length would change with that of the others; use context.rope.type='keep'"
        )
    if gone := rope.lost(spec.rope, extended):
        kept = (
            f"; context.rope.type={spec.rope.type!r} keeps them"
            if spec.rope.type in rope.EXTENDABLE
            else ""
        )
        logging.warning(
            "context.rope.type=%r replaces the %s scaling of the base, and its %s are lost%s",
            type,
            spec.rope.type,
            ", ".join(gone),
            kept,
        )
    elif extended.attention_factor is not None:
        logging.warning(
            "the base fixes attention_factor=%s, which stays as the factor grows from %g to %g",
            extended.attention_factor,
            spec.rope.factor,
            extended.factor,
        )
    return dataclasses.replace(spec, rope=extended, max_length=length)


def abstract_model(config, hf_config: dict) -> Decoder:
    """The decoder of a run with its adapters attached and its trainable Variables marked; no values
    yet.
    """
    spec = extended_spec(hf_config, config.context)
    each = config.memory.layers_per_residual
    if not share_residuals(spec.layers, each):
        shape = " + ".join(f"{times} x {len(places)}" for _, places, times in repeats(spec.layers))
        usable = [n for n in range(1, spec.L + 1) if share_residuals(spec.layers, n)]
        raise ConfigError(
            f"memory.layers_per_residual={each} does not divide the {spec.L} layers of the model, which come "
            f"as {shape} (times x pattern): use one of {', '.join(map(str, usable))}"
        )
    model = Decoder(spec)
    if config.train_type == "full":
        lora.mark_trainable(model)
    else:
        attach_adapters(model, config)
    form, dtype = form_of(config.model.quantize, hf_config), jnp.dtype(config.model.dtype)
    if form:
        _quantise(model, ("kernel",), lambda rows: form, dtype)
    if config.optimizer.name == "q_galore":
        _quantise(
            model,
            ("kernel", "embed", "head"),
            lambda rows: quantize.integers(8, rows),
            dtype,
            trainable=True,
        )
    _multiply_in(model, config.model.matmul)
    return model


def attach_adapters(model: Decoder, config) -> None:
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


def _multiply_in(model: Decoder, matmul: str) -> None:
    for _, linear in lora.linear_layers(model) if matmul == "fp8" else ():
        if type(linear) is Linear:  # experts have a grouped product
            linear.dot = fp8.fp8_dot


def _quantise(model: Decoder, roles, form_for, dtype, trainable: bool = False) -> None:
    """Makes those weights of an abstract model that train, or those that do not, quantised ones;
    form_for(inputs): see Form.
    """
    for _, variable in declared(model):
        shape = variable.get_value().shape
        if (
            variable.get_metadata("role") in roles
            and variable.get_metadata().get("trainable", False) == trainable
        ):
            variable.set_value(quantize.abstract(shape, form_for(shape[-2]), dtype))


def placed_model(config, hf_config: dict, mesh: Mesh) -> Decoder:
    """`abstract_model` with the dtype that each value will have and its place on `mesh`: enough to
    compile with.
    """
    if config.model.matmul == "fp8":
        fp8.check(device.device_kind for device in mesh.devices.flat)
    model = abstract_model(config, hf_config)
    for _, variable in declared(model):
        value = variable.get_value()
        if not isinstance(value, quantize.Quantised):
            value = jax.ShapeDtypeStruct(
                value.shape, dtype_of(variable, jnp.dtype(config.model.dtype))
            )
        variable.set_value(
            jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                value,
                _place(variable, mesh),
            )
        )
    return model


def build_model(config, base, mesh: Mesh) -> Decoder:
    """The decoder of a run, with its values on `mesh`."""
    model = abstract_model(config, base.config)
    fill(model, config, base, mesh)
    return model


def fill(model: Decoder, config, base, mesh: Mesh) -> dict[str, int]:
    """Puts the values of a run into its abstract model: the base's, those of `lora.adapter`, fresh
    ones elsewhere. Returns the checksums of what was read of the base, see `load_weights`.
    """
    dtype, sums = jnp.dtype(config.model.dtype), {}

    def shardings(variable):
        return _place(variable, mesh)

    if starts_from_base(model):
        started = StartedBase(base, model)
        sums = load_weights(model, started, dtype=dtype, shardings=shardings)
        started.give_factors(shardings)
    elif config.model.init == "pretrained":
        sums = load_weights(model, base, dtype=dtype, shardings=shardings)
    if config.lora.adapter:
        load_adapter(model, config.lora.adapter, shardings=shardings)
    deviation = base.config.get("initializer_range", 0.02)
    initialise(model, config.seed, deviation=deviation, dtype=dtype, shardings=shardings)
    return sums


def load_base(
    base,
    spec: DecoderSpec,
    dtype,
    quantise: str = "none",
    matmul: str = "default",
    layout: sharding.Layout | None = None,
) -> Decoder:
    """The base alone under `spec`, to compare with or to talk to; quantise, matmul: as
    `model.quantize` and `model.matmul`.
    layout: where it is to lie; None for one device.
    """
    model = Decoder(spec)
    _multiply_in(model, matmul)
    if form := form_of(quantise, base.config):
        _quantise(model, ("kernel",), lambda rows: form, dtype)
    load_weights(model, base, dtype=dtype, shardings=places(layout))
    return model


def answering(spec: DecoderSpec) -> sharding.Layout | None:
    """The layout of a model that answers and does not train: its heads on as many of this process's
    devices as divide them; None for one device.
    """
    here = jax.local_devices()
    parts = math.gcd(spec.N, spec.K, len(here))
    return (
        sharding.Layout(sharding.make_mesh(tensor=parts, devices=here[:parts]))
        if parts > 1
        else None
    )


def places(layout: sharding.Layout | None) -> Callable | None:
    """Where a Variable's value lies under a layout, as those who load weights take it."""
    return layout and (lambda variable: _place(variable, layout.mesh))


def mesh_of(mesh, devices=None) -> Mesh:
    """The mesh that `config.mesh` describes, over `devices` or every device there is."""
    return sharding.make_mesh(**{axis: mesh[axis] for axis in sharding.AXES}, devices=devices)


def move(model: Decoder, mesh: Mesh) -> None:
    """Moves the values of a model that is at hand onto `mesh`."""
    for _, variable in declared(model):
        variable.set_value(jax.tree.map(sharding.put, variable.get_value(), _place(variable, mesh)))


def _place(variable, mesh: Mesh):
    return sharding.value_sharding(mesh, variable.get_metadata("axes"), variable.get_value())
