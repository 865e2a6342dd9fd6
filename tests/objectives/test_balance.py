"""The load of experts and the loss that balances it: as transformers', and the same however the
model is run.
"""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from flax import nnx

from lljax.attention.pattern import FULL, AttentionPattern
from lljax.build import move
from lljax.config import default_config, validate
from lljax.errors import ConfigError
from lljax.interop.peft import write_adapter
from lljax.models import lora
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.memory import Memory
from lljax.objectives.balance import expert_load_max, load_balancing_loss
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import layout_of, place
from lljax.training.prepare import prepare_step
from lljax.training.state import split
from lljax.training.step import accumulate, make_step, step_settings

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ONE = make_mesh(devices=jax.devices()[:1])
SHIFTED = AttentionPattern("shifted", group=16)
T = 48
HF = {
    "model_type": "deepseek_v3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": T,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "tie_word_embeddings": True,
}


def test_equals_transformers_in_value_and_in_the_gradient_of_a_factor(tmp_path):
    theirs = families.write_torch(tmp_path, "qwen3_moe")
    base, model = families.read(tmp_path)
    lora.attach(model, rank=2, alpha=4.0, targets=("q_proj",))
    families.fill(model, 0.1)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", base_name=base.path)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    mask = np.ones(families.TOKENS.shape, np.int32)
    mask[1, 90:] = 0
    tokens, real = torch.from_numpy(families.TOKENS), torch.from_numpy(mask)
    wanted = adapted(tokens, attention_mask=real, output_router_logits=True).aux_loss
    wanted.backward()

    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

    @jit
    @jax.value_and_grad
    def balance(trainable):
        positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
        _, load = nnx.merge(graphdef, trainable, frozen)(
            jnp.asarray(families.TOKENS), positions=positions, counted=mask != 0
        )
        return load_balancing_loss(load, mask.sum())

    value, gradient = balance(trainable)
    assert value == pytest.approx(wanted.item(), rel=1e-6)
    write_adapter(nnx.merge(graphdef, gradient, frozen), tmp_path / "adapter", base_name="")
    ours = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    factors = {
        name.replace(".default", ""): x.grad.numpy()
        for name, x in adapted.named_parameters()
        if x.grad is not None
    }
    assert factors.keys() == ours.keys()
    for name, grad in factors.items():
        np.testing.assert_allclose(
            ours[name], grad, atol=1e-5 * max(np.abs(x).max() for x in factors.values())
        )


def test_busiest_is_the_worst_expert_of_the_worst_layer():
    even, uneven = jnp.full(4, 6.0), jnp.asarray([3.0, 12.0, 9.0, 0.0])
    load = jnp.stack([jnp.stack([even, even]), jnp.stack([uneven, even])])
    assert expert_load_max(load) == 2 and expert_load_max(load[:1]) == 1
    assert load_balancing_loss(load[:1] / 6, 4) == 1


# ---------------------------------------------------------------- however the model is run


def rows(count):
    """Packed rows, every other one ending in padding."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, size=(count, T)), axis=1)
    segments[1::2, -T // 5 :] = 0
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    batch = {
        "tokens": rng.integers(0, 61, (count, T)),
        "targets": np.where(segments == 0, -100, 1),
        "segments": segments,
        "positions": positions,
    }
    return {name: np.asarray(x, np.int32) for name, x in batch.items()}


def decoder(mesh, **changes):
    """Routers, factors and norms train."""
    model = Decoder(spec_from_hf(HF | changes))
    lora.attach(model, rank=2, alpha=4.0, targets=("all-linear",))
    lora.mark_trainable(model, {"lora_a", "lora_b", "norm", "router"})
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        variable.set_value(
            jnp.asarray(rng.normal(size=variable.get_value().shape) * 0.2, jnp.float32)
        )
    move(model, mesh)
    return model


def load_and_gradients(mesh, memory, pattern=FULL, count=4):
    """Of two passes: the load, the balance by predicted tokens, and its gradient."""
    model = decoder(mesh)
    layout, _ = layout_of(mesh, "auto", pattern, T, model.spec)
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

    @jit
    def run(trainable, frozen, batch):
        def loss(trainable, frozen, micro, key):
            counted = micro["segments"] != 0
            model = nnx.merge(graphdef, trainable, frozen)
            _, load = model(
                micro["tokens"],
                positions=micro["positions"],
                segments=micro["segments"],
                index=micro["index"],
                pattern=pattern,
                layout=layout,
                memory=memory,
                counted=counted,
            )
            return load_balancing_loss(load, counted.sum()) * (micro["targets"] != -100).sum(), load

        (balance, load), gradients = accumulate(
            loss, trainable, frozen, batch, jax.random.key(0), lambda loads: loads.sum(0)
        )
        return load, balance, gradients

    batch = place(rows(count), 2, mesh, layout)
    return jax.tree.map(np.asarray, run(nnx.as_pure(trainable), nnx.as_pure(frozen), batch))


@pytest.fixture(scope="module")
def one_device():
    return functools.cache(
        lambda pattern, count: load_and_gradients(ONE, Memory("none"), pattern, count)
    )


def assert_same(got, wanted):
    np.testing.assert_array_equal(got[0][:, 0], wanted[0][:, 0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory,pattern",
    [
        # streamed
        (Memory("full", layers_per_residual=2, tile=20), FULL),
        (Memory("attention", tile=20), SHIFTED),
        (Memory("full", offload=True), FULL),
    ],
    ids=str,
)
def test_the_load_is_the_same_whatever_is_kept(one_device, memory, pattern):
    assert_same(load_and_gradients(ONE, memory, pattern), one_device(pattern, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes,count",
    [
        ({"expert": 2, "fsdp": 2, "sequence": 2}, 8),
        ({"expert": 4, "tensor": 2}, 8),
        ({"data": 2, "expert": 4}, 16),
        ({"sequence": 4, "tensor": 2}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", [0, 7])
def test_the_load_over_devices_is_that_of_one(one_device, sizes, count, tile):
    got = load_and_gradients(make_mesh(**sizes), Memory("full", tile=tile), count=count)
    assert_same(got, one_device(FULL, count))


# ---------------------------------------------------------------- in the step


def config_of(coefficient=0.0):
    c = default_config()
    c.model.path, c.model.dtype, c.memory.remat = "tiny", "float32", "none"
    c.context.schedule = ((1, T, "full"),)
    c.training.router_aux_loss_coef = coefficient
    return c


DENSE = {"first_k_dense_replace": HF["num_hidden_layers"]}


def metrics_of_a_step(coefficient=0.0, **changes):
    """(state, frozen, batch) -> metrics, and the first two."""
    config = config_of(coefficient)
    parts = split(config, decoder(ONE, **changes), ONE)
    step = make_step(parts, step_settings(config))
    return lambda *args: step(*args, FULL)[1], parts.state, parts.frozen


def test_a_model_without_experts_has_nothing_to_balance():
    batch = place(rows(4), 2, ONE, None)
    metrics = jax.eval_shape(*metrics_of_a_step(**DENSE), batch)
    assert not {"load_balancing_loss", "expert_load_max"} & set(metrics)
    with pytest.raises(
        ConfigError, match="coef=0.01 balances experts, and model.path='tiny' has none: set it to 0"
    ):
        prepare_step(config_of(0.01), {}, ONE, model=decoder(ONE, **DENSE))
    c = default_config()
    c.training.router_aux_loss_coef = -1.0
    with pytest.raises(ConfigError, match="router_aux_loss_coef=-1.0 is not a number from 0"):
        validate(c)


@pytest.mark.slow
def test_the_step_reports_it_and_minimizes_it_where_it_is_told_to(one_device):
    load, balance, gradients = one_device(FULL, 4)
    batch = place(rows(4), 2, ONE, None)
    tokens = (rows(4)["targets"] != -100).sum()
    seen = {}
    for coefficient in (0.0, 1e5):
        step, state, frozen = metrics_of_a_step(coefficient)
        seen[coefficient] = step(state, frozen, batch)
        assert seen[coefficient]["load_balancing_loss"] == pytest.approx(balance / tokens, rel=1e-5)
        assert seen[coefficient]["expert_load_max"] == pytest.approx(
            float(expert_load_max(load)), rel=1e-6
        )
    assert seen[1e5]["loss"] == pytest.approx(float(seen[0.0]["loss"]), rel=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradients))) / tokens
    assert seen[1e5]["grad_norm"] == pytest.approx(1e5 * norm, rel=1e-2)
