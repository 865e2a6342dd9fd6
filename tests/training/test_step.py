"""An evaluation obeys the settings of memory, and computes what the objective says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from lljax.build import mesh_of
from lljax.config import default_config
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.parallel.sharding import make_mesh
from lljax.planning import fit
from lljax.training.placement import place
from lljax.training.prepare import prepare_step

T = 1024
ONE = make_mesh(devices=jax.devices()[:1])


def config_of(length=T, **memory):
    c = default_config()
    c.context.length, c.context.schedule = length, ((1, length, "full"),)
    c.model.dtype, c.mesh.fsdp = "float32", 1
    c.memory.update(memory)
    return c


def test_an_evaluation_is_the_mean_loss_of_the_dense_model_whatever_the_tile():
    model = Decoder(spec_from_hf(TINY | {"intermediate_size": 1024}))
    initialize(model, 0, deviation=0.2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (1, T)).astype(np.int32)
    targets = np.where(rng.random((1, T)) < 0.3, -100, np.roll(tokens, -1, axis=1))
    positions = np.arange(T, dtype=np.int32)[None]
    batch = {"tokens": tokens, "targets": targets, "segments": np.ones_like(tokens)}
    batch = place(batch | {"positions": positions}, 1, ONE, None)
    logits = model.logits(model(jnp.asarray(tokens), positions=jnp.asarray(positions)))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(targets, 0)[..., None], -1)
    wanted = -np.sum(np.where(targets == -100, 0, picked[..., 0]))
    for tile in (0, 64):
        prepared = prepare_step(
            config_of(tile=tile), {}, ONE, model=model, stages=[], evaluation_lengths=[T]
        )
        evaluate = prepared.evaluations[T].compile()
        sums, weight = evaluate(prepared.state.trainable, prepared.frozen, batch)
        assert weight == (targets != -100).sum()
        np.testing.assert_allclose(sums["loss"], wanted, rtol=1e-5)
        mean = {"loss": float(sums["loss"] / weight)}
        assert prepared.objective.scores(mean)["perplexity"] == pytest.approx(np.exp(mean["loss"]))


def test_an_evaluation_takes_a_tile_at_a_time_and_less_than_its_step():
    needs = {}
    for tile in (0, 64):
        prepared = prepare_step(
            config_of(tile=tile, loss_chunk=64),
            TINY | {"intermediate_size": 1024},
            ONE,
            evaluation_lengths=[T],
        )
        needs[tile] = fit.need_of(prepared.evaluations[T], prepared)
    n = needs[64]
    assert n.peak >= n.base + n.trainable + n.optimizer + n.temporary and n.optimizer > 0
    assert n.temporary < needs[0].temporary / 2
    assert n.temporary < fit.need_of(prepared.steps[0], prepared).temporary


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "shifted"])
def test_an_evaluation_of_65536_tokens_takes_less_than_half_of_its_step(attention):
    """4 layers, D 512, tiles of 512: 778 MiB of temporaries, and 2,150 of the step in full
    attention.
    """
    c = config_of(65_536, tile=512)
    c.context.schedule, c.model.dtype = ((1, 65_536, attention),), "bfloat16"
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 65_536,
    }
    mesh = mesh_of(c.mesh, jax.devices()[:1])
    prepared = prepare_step(c, TINY | sizes, mesh, evaluation_lengths=[65_536])
    step, evaluation = (
        fit.need_of(program, prepared).temporary
        for program in (prepared.steps[0], prepared.evaluations[65_536])
    )
    assert evaluation < step / 2 and evaluation < 900 * 2**20
