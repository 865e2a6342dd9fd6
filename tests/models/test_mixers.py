"""The table of mixers, proved by a row from outside: an exponential moving average with a gate."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax import build
from lljax.attention.pattern import AttentionPattern
from lljax.errors import ConfigError
from lljax.interop import safetensors
from lljax.interop.huggingface import tensors
from lljax.models import lora
from lljax.models.cache import empty_cache, grow, take_rows
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.flops import RowFlops, token_flops
from lljax.models.initialize import initialize
from lljax.models.linear import Linear
from lljax.models.memory import Memory
from lljax.models.mixers import MIXERS
from lljax.models.spec import LayerSpec
from lljax.parallel.sharding import make_mesh
from lljax.report.records import read_metrics
from lljax.run import loop
from lljax.training.placement import layout_of

D, V = 36, 97
HF = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LAYERS = (LayerSpec(mixer="average"), LayerSpec())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AverageState:
    """The average [B, D] after the last token: constant in the length."""

    average: jax.Array

    def write(self, update, start):
        return AverageState(update.average.astype(self.average.dtype))

    def part(self, start, T):
        return self

    def grow(self, slots):
        return self

    def fork(self, B, S):
        return AverageState(jnp.repeat(self.average[:1], B, axis=0))


class MovingAverage(nnx.Module):
    """y_t = f_t y_(t-1) + (1 - f_t) v_t with a gate f_t; it starts anew in every document."""

    hf_name: ClassVar[str] = "average"
    refused_modes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("allgather", "ulysses", "ring", "halo"), "a moving average stays on one device"
    )
    ordered: ClassVar[bool] = True
    branches: ClassVar[bool] = False

    def __init__(self, spec, layer, hf):
        self.gate_proj, self.in_proj, self.out_proj = (
            Linear((spec.D, spec.D), axes=("embed", None), hf=f"{hf}.{name}")
            for name in ("gate_proj", "in_proj", "out_proj")
        )
        self.D = spec.D

    def project(self, x, positions, dropout_key):
        return jax.nn.sigmoid(self.gate_proj(x, dropout_key)), self.in_proj(x, dropout_key)

    def mix(self, operands, context, state):
        segments = self._segments(context.mask)
        average = jnp.zeros_like(operands[1][:, 0]) if state is None else state.average
        if context.count is not None:  # padding keeps the average
            real = (jnp.arange(segments.shape[1]) < context.count[:, None])[..., None]
            operands = jnp.where(real, operands[0], 1), operands[1]
        mixed, (last, _) = self._averages(operands, segments, (average, segments[:, 0]))
        return mixed, None if state is None else state.write(AverageState(last), context.start)

    def first_carry(self, project, xs, context):
        x, segments = xs[0], self._segments(context.mask)
        return jnp.zeros((x.shape[0], self.D), x.dtype), segments[:, 0]

    def mix_tile(self, operands, context, carry):
        return self._averages(operands, self._segments(context.mask), carry)

    def output(self, mixed, dropout_key):
        return self.out_proj(mixed, dropout_key)

    def token_flops(self):
        return token_flops(self)

    def row_flops(self, T, pattern):
        forward = 3.0 * T * self.D
        return RowFlops(forward=forward, backward=2 * forward, recomputed=0.0, streamed=True)

    @staticmethod
    def abstract_state(spec, layer, B, S, dtype):
        return AverageState(jax.ShapeDtypeStruct((B, spec.D), jnp.float32))

    def _segments(self, mask):
        return jnp.ones_like(mask.q_index) if mask.q_segments is None else mask.q_segments

    def _averages(self, operands, segments, before):
        (gate, value), (average, segment) = operands, before
        previous = jnp.concatenate([segment[:, None], segments[:, :-1]], axis=1)
        kept = jnp.where((segments == previous)[..., None], gate, 0)
        added = jnp.where((segments != 0)[..., None], (1 - gate) * value, 0)

        def step(average, xs):
            average = xs[0] * average + xs[1]
            return average, average

        last, mixed = jax.lax.scan(
            step, average, (jnp.moveaxis(kept, 1, 0), jnp.moveaxis(added, 1, 0))
        )
        return jnp.moveaxis(mixed, 0, 1), (last, segments[:, -1])


@pytest.fixture(autouse=True)
def row_of_the_table(monkeypatch):
    monkeypatch.setitem(MIXERS, "average", MovingAverage)


def hybrid(spec, layers=LAYERS):
    return dataclasses.replace(spec, layers=layers)


def model_of(layers=LAYERS, **adapters):
    model = Decoder(hybrid(spec_from_hf(HF), layers))
    if adapters:
        lora.attach(model, rank=4, alpha=8, **adapters)
    initialize(model, 0, deviation=0.2)
    return model


def tokens_of(B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, size=(B, T)), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss_and_gradients(graphdef, state, tokens, segments, memory):
    def loss(state):
        model = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, positions=positions, segments=segments, memory=memory)
        return jnp.sum(model.logits(hidden)[..., 0] * (segments > 0))

    return jax.value_and_grad(loss)(state)


def test_a_row_of_the_table_runs_in_tiles_as_at_once():
    """Packed and padded rows; the tiles divide neither."""
    graphdef, state = nnx.split(model_of(layers=LAYERS[:1]))
    segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3])
    tokens, memories = tokens_of(2, 10), (Memory(), Memory("full", tile=4))
    whole, tiled = (loss_and_gradients(graphdef, state, tokens, segments, m) for m in memories)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(tiled), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_it_decodes_through_the_cache_as_in_a_whole_row():
    """Rows of different lengths with padding behind them, reordered, in a cache that grows."""
    model, tokens = model_of(), tokens_of(2, 16)
    whole = model.logits(model(tokens, positions=jnp.arange(16)[None].repeat(2, 0)))
    read = nnx.jit(lambda model, *args: model.continued(*args[:2], count=args[2]))
    padded = tokens[:, :9].at[1, 5:].set(3)
    _, cache = read(model, empty_cache(model.spec, 2, 9), padded, jnp.asarray([9, 5]))
    cache = grow(take_rows(cache, jnp.asarray([1, 0])), 20)
    for i in range(7):
        step = jnp.stack([tokens[1, 5 + i], tokens[0, 9 + i]])[:, None]
        hidden, cache = read(model, cache, step, jnp.asarray([1, 1]))
        wanted = jnp.stack([whole[1, 5 + i], whole[0, 9 + i]])
        np.testing.assert_allclose(model.logits(hidden[:, 0]), wanted, atol=2e-5)


def test_its_arithmetic_and_its_adapters_are_counted():
    targets = (r"average\.in_proj", "q_proj")
    plain, adapted = model_of(), model_of(targets=targets)
    attention = Decoder(hybrid(spec_from_hf(HF), (LayerSpec(),) * 2))
    expected = 2 * (3 * D * D - (6 + 2 + 2 + 6) * 8 * D)  # its projections for attention's
    assert plain.token_flops().forward - attention.token_flops().forward == expected
    added = adapted.token_flops().forward - plain.token_flops().forward
    assert added == 2 * 4 * ((D + D) + (D + 48))
    average, of_attention = plain.row_flops(16, AttentionPattern())
    assert average.forward == 3 * 16 * D and of_attention.forward == 2 * 6 * (16 * 17 / 2) * 16


def test_a_mode_that_it_refuses_is_refused_with_its_reason():
    mesh = make_mesh(sequence=2, devices=jax.devices()[:2])
    with pytest.raises(ConfigError, match="halo: a moving average stays on one device"):
        layout_of(mesh, "auto", AttentionPattern(), 32, hybrid(spec_from_hf(HF)))


@pytest.mark.slow
def test_a_run_trains_it_and_resumes_bitwise(run_config, tmp_path, monkeypatch):
    extended = build.extended_spec
    monkeypatch.setattr(build, "extended_spec", lambda *args: hybrid(extended(*args)))
    run_config.model.path = write_base(run_config.model.path, tmp_path / "base")
    run_config.optimizer.learning_rate = 1e-2
    run_config.lora.targets = ("q_proj", "in_proj", "gate_proj", "out_proj")
    run_config.context.schedule, run_config.data.valid_fraction = ((6, 32, "full"),), 0.0
    whole = loop.train(run_config, tmp_path / "whole")
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole") if "loss" in record]
    assert losses[-1] < losses[0] - 0.1
    for name in ("in_proj", "gate_proj", "out_proj"):
        assert np.abs(np.asarray(getattr(whole.layers[0].self_attn, name).lora.b[...])).max() > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    newest = max((tmp_path / "parts" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.rmtree(newest)
    again = loop.train(run_config, tmp_path / "parts")
    for x, y in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def write_base(like, folder):
    """The tokenizer and the config.json of another base beside the weights of a hybrid."""
    shutil.copytree(like, folder)
    model = Decoder(hybrid(spec_from_hf(json.loads((folder / "config.json").read_text()))))
    initialize(model, 0, deviation=0.2)
    arrays = dict(tensors(model))
    header = safetensors.layout(arrays.items())
    safetensors.write(folder / "model.safetensors", header, lambda name: arrays[name])
    return str(folder)


def leaves(model):
    return jax.tree.leaves(nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1]))
