import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.build import abstract_model, build_model, mesh_of, placed_model
from lljax.config import validate
from lljax.errors import ConfigError
from lljax.interop.open import open_base
from lljax.models import lora
from lljax.models.declare import declared
from lljax.models.quantize import (
    DYNAMIC,
    FORMS,
    NF4,
    Form,
    Quantized,
    abstract_quantized,
    dequantize,
    integer_form,
    quantize,
)
from lljax.objectives.token_loss import cross_entropy
from lljax.parallel.sharding import make_mesh
from lljax.planning import fit
from lljax.planning.flops import of_step
from lljax.report.records import read_metrics
from lljax.run import loop
from lljax.training.curriculum import stages
from lljax.training.placement import layout_of
from lljax.training.prepare import prepare_step

FORMATS = list(FORMS)
encode = functools.partial(jax.jit, static_argnums=(1, 2))(quantize)
decode = functools.partial(jax.jit, static_argnums=1)(dequantize)


def kernel(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def nearest(table, x):
    return table[np.abs(x[..., None] - table).argmin(-1)]


def by_definition(w, format, block):
    """What a kernel [in, out] becomes, block by block, from the formats' definitions."""
    rows, out = w.shape
    blocks = w.T.reshape(out, rows // block, block)  # as bitsandbytes flattens [out, in]
    largest = np.abs(blocks).max(-1, keepdims=True)
    if format.startswith("nf4"):
        codes = nearest(NF4, blocks / largest)
        if format == "nf4-double":
            flat = largest.reshape(-1) - largest.mean()
            parts = [flat[i : i + 256] for i in range(0, len(flat), 256)]
            parts = [
                nearest(DYNAMIC, part / np.abs(part).max()) * np.abs(part).max() for part in parts
            ]
            largest = np.concatenate(parts).reshape(largest.shape) + largest.mean()
        x = codes * largest
    elif format == "fp8":
        scale = largest / np.float32(448)
        x = (blocks / scale).astype(jnp.float8_e4m3fn).astype(np.float32) * scale
    else:
        scale = largest / np.float32(7 if format == "int4" else 127)
        x = np.round(blocks / scale) * scale
    return x.reshape(out, rows).T


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_those_of_the_definition(format):
    w, form = kernel(384, 80), FORMS[format]
    value = encode(w, form, jnp.float32)
    np.testing.assert_allclose(
        decode(value, jnp.float32), by_definition(w, format, form.block), rtol=2e-6, atol=1e-6
    )
    assert value.codes.dtype.itemsize * value.codes.size == 384 * 80 * form.bits // 8


@pytest.mark.parametrize("format", FORMATS)
def test_leading_axes_are_so_many_kernels_and_rows_need_not_fill_a_block(format):
    w = kernel(2, 3, 100, 16)
    value = encode(w, FORMS[format], jnp.bfloat16)
    whole = decode(value, jnp.float32)
    assert value.shape == whole.shape == w.shape and value.dtype == jnp.bfloat16
    for i, j in np.ndindex(2, 3):
        one = decode(encode(w[i, j], FORMS[format], jnp.bfloat16), jnp.float32)
        np.testing.assert_allclose(whole[i, j], one, rtol=1e-6, atol=1e-7)
    assert np.abs(whole - w).max() < {"int8": 0.03, "fp8": 0.15}.get(format, 0.6)
    outline = abstract_quantized(w.shape, FORMS[format], jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), outline) == jax.tree.map(
        lambda x: (x.shape, x.dtype), value
    )


def test_a_kernel_of_zeros_stays_zero_and_a_zero_point_is_kept():
    for form in [*FORMS.values(), Form("int4", 32, zero=True)]:
        assert not np.asarray(
            decode(encode(jnp.zeros((64, 4)), form, jnp.float32), jnp.float32)
        ).any()


def test_rounding_at_random_is_right_on_average():
    w = kernel(256, 4)
    value = encode(w, integer_form(8, 256), jnp.float32)  # one block an output
    many = jax.jit(
        jax.vmap(lambda key: dequantize(quantize(w, value.form, jnp.float32, key), jnp.float32))
    )(jax.random.split(jax.random.key(0), 2000))
    assert (jnp.abs(many - w) <= 1.001 * value.scale).all()
    # five deviations of the mean of 2,000
    assert jnp.abs((many.mean(0) - w) / value.scale).max() < 0.06


def loss_and_gradients(config, base, mesh):
    """Of a model whose B factors are away from zero, on 8 rows."""
    model = build_model(config, base, mesh)
    for _, variable in declared(model):
        if variable.get_metadata("role") == "lora_b":
            variable.set_value(variable.get_value() + 0.1)
    stage = stages(config.context)[0]
    layout, _ = layout_of(mesh, "auto", stage.pattern, stage.length, model.spec)
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (8, 32)), jnp.int32)

    @jax.jit
    def run(trainable, frozen):
        def loss(trainable):
            model = nnx.merge(graphdef, trainable, frozen)
            hidden = model(
                tokens, positions=jnp.broadcast_to(jnp.arange(32), tokens.shape), layout=layout
            )
            return cross_entropy(hidden, model.head, tokens, chunk=64, layout=layout)

        return jax.value_and_grad(loss)(trainable)

    return jax.tree.map(np.asarray, run(nnx.as_pure(trainable), nnx.as_pure(frozen)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "format,mesh",
    [
        pytest.param("nf4-double", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ("fp8", {"fsdp": 8}),
    ],
)
def test_spread_over_devices_equals_one_device(run_config, format, mesh):
    run_config.model.quantize = format
    base = open_base(run_config.model.path)
    loss, gradients = loss_and_gradients(run_config, base, make_mesh(devices=jax.devices()[:1]))
    spread_loss, spread = loss_and_gradients(run_config, base, make_mesh(**mesh))
    np.testing.assert_allclose(spread_loss, loss, rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(gradients), strict=True):
        assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_codes_and_scales_are_cut_alike_over_the_devices_that_divide_them(run_config):
    run_config.model.quantize, run_config.mesh.fsdp, run_config.mesh.tensor = "nf4", 4, 2
    hf_config = open_base(run_config.model.path).config | {
        "hidden_size": 512,
        "intermediate_size": 1024,
    }
    model = placed_model(run_config, hf_config, mesh_of(run_config.mesh))
    up, down = (
        layer.kernel.get_value()
        for layer in (model.layers[0].mlp.up_proj, model.layers[0].mlp.down_proj)
    )
    # embed over fsdp, mlp over tensor
    assert up.codes.sharding.shard_shape(up.codes.shape) == (2, 2, 32, 512)
    assert up.scale.sharding.shard_shape(up.scale.shape) == (2, 2, 512)
    assert down.codes.sharding.shard_shape(down.codes.shape) == (2, 8, 32, 128)
    assert down.scale.sharding.shard_shape(down.scale.shape) == (2, 8, 128)


def test_only_frozen_kernels_are_quantized_and_count_as_the_dense_ones_do(run_config):
    base = open_base(run_config.model.path)
    dense = abstract_model(run_config, base.config)
    run_config.model.quantize = "nf4"
    model = abstract_model(run_config, base.config)
    roles = {
        variable.get_metadata("role")
        for _, variable in declared(model)
        if isinstance(variable.get_value(), Quantized)
    }
    assert roles == {"kernel"}
    stage = stages(run_config.context)[0]
    assert of_step(model, run_config, stage) == of_step(dense, run_config, stage)


def test_a_step_holds_no_second_copy_of_the_kernels_nor_their_dense_form(run_config):
    """Of a deep model, what a step needs beside its arguments is far less than the dense
    kernels.
    """
    run_config.model.quantize, run_config.mesh.data, run_config.lora.also_train = (
        "nf4-double",
        1,
        (),
    )
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 24}
    hf_config = open_base(run_config.model.path).config | sizes
    mesh = make_mesh(devices=jax.devices()[:1])
    model = placed_model(run_config, hf_config, mesh)
    dense = 4 * sum(
        np.prod(v.get_value().shape)
        for _, v in declared(model)
        if v.get_metadata("role") == "kernel"
    )
    stage = stages(run_config.context)[0]
    run_config.training.rows = 1
    prepared = prepare_step(run_config, hf_config, mesh, model=model, stages=[stage])
    need = fit.need_of(prepared.steps[stage.number], prepared)
    assert need.base < dense / 6 and need.temporary < dense / 4


@pytest.mark.slow
def test_lora_over_an_nf4_base_learns(run_config, tmp_path):
    run_config.model.quantize, run_config.lora.targets = "nf4-double", ("all-linear",)
    run_config.context.schedule, run_config.optimizer.learning_rate = ((12, 32, "full"),), 1e-2
    model = loop.train(run_config, tmp_path)
    losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    assert isinstance(model.layers[0].mlp.up_proj.kernel.get_value(), Quantized)


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"train_type": "full"}, "model.quantize='nf4' and train_type='full'"),
        ({"memory.remat": "none"}, "memory.remat='none'.*model.quantize='nf4'"),
        ({"model.quantize": "int3"}, "model.quantize='int3' is none of"),
    ],
)
def test_combinations_that_cannot_be_are_refused(run_config, fields, line):
    run_config.update_from_flattened_dict({"model.quantize": "nf4"} | fields)
    with pytest.raises(ConfigError, match=line):
        validate(run_config)
