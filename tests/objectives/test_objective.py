"""A toy objective as one row of the table: trained, planned, checkpointed, resumed, reported."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from objectives.toy import WEIGHTED, weights_of

from lljax.config import default_config, validate
from lljax.data.batch import IGNORED
from lljax.errors import ConfigError
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.sharding import make_mesh
from lljax.report.records import read_metrics
from lljax.training.placement import place
from lljax.training.prepare import prepare_step
from lljax.training.step import metrics_of

T = 32
ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def weighted(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "weighted", WEIGHTED)
    return WEIGHTED


def config_of(objective):
    c = default_config()
    c.model.path, c.model.dtype, c.objective.name = "tiny", "float32", objective
    c.context.length, c.context.schedule = T, ((1, T, "full"),)
    c.training.rows, c.training.accumulate, c.mesh.fsdp = 2, 3, 1
    c.data.train = ("-",)
    return c


def batch_of(rows):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (rows, T)).astype(np.int32)
    targets = np.where(rng.random((rows, T)) < 0.3, IGNORED, np.roll(tokens, -1, 1))
    return {
        "tokens": tokens,
        "targets": targets.astype(np.int32),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape),
        "weights": weights_of({"targets": targets}),
    }


def test_a_step_of_the_toy_reports_weighted_means_and_its_own_metrics(weighted):
    model = Decoder(spec_from_hf(TINY))
    initialize(model, 0, deviation=0.2)
    batch = batch_of(6)
    logits = model.logits(
        model(jnp.asarray(batch["tokens"]), positions=jnp.asarray(batch["positions"]))
    )
    index = np.maximum(batch["targets"], 0)[..., None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), index, -1)[..., 0]
    log_probs = np.where(batch["targets"] == IGNORED, 0, picked)
    c = config_of("weighted")
    c.train_type = "full"
    prepared = prepare_step(c, {}, ONE, model=model)
    assert prepared.steps[0].batch["weights"].dtype == np.float32
    step, placed = prepared.steps[0].compile(), place(batch, 3, ONE, None)
    _, metrics = step(prepared.state, prepared.frozen, placed)
    weight = batch["weights"].sum()
    wanted = -(batch["weights"] * log_probs).sum() / weight
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["squared"], (log_probs**2).sum() / weight, rtol=1e-5)
    np.testing.assert_allclose(metrics["worst_token"], -log_probs.min(), rtol=1e-5)
    assert metrics["tokens"] == weight
    assert set(metrics) == {metric.name for metric in metrics_of(weighted)}


def test_the_table_decides_what_a_configuration_may_name(weighted):
    validate(config_of("weighted"))
    with pytest.raises(ConfigError, match="objective.name='dpp'.*sft.*weighted"):
        validate(config_of("dpp"))
    with pytest.raises(ConfigError, match="experts have no weights"):
        experts = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}
        sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        prepare_step(config_of("weighted"), TINY | experts | sizes, ONE)


@pytest.fixture
def config(run_config):
    c = run_config
    c.objective.name, c.context.schedule = "weighted", ((3, 32, "full"),)
    c.training.rows, c.training.eval_rows, c.training.accumulate = 4, 4, 2
    c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
    return c


def test_a_run_with_the_toy_is_planned_and_its_metrics_are_recorded_and_drawn(
    weighted, config, train_on_one_device, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        train_on_one_device(config, tmp_path)
    assert "evaluation of 32" in caplog.text and "temporary" in caplog.text
    records = read_metrics(tmp_path)
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 3 and all(0 < r["loss"] < r["worst_token"] for r in steps)
    assert [set(r["eval"]) for r in records if "eval" in r] == [{"weighted_loss@32"}]
    assert "Loss of the worst token" in (tmp_path / "report.html").read_text()
    config.objective.name = "sft"
    with pytest.raises(ConfigError, match="objective.name"):
        train_on_one_device(config, tmp_path)


@pytest.mark.slow
def test_a_run_with_the_toy_resumes_bitwise(weighted, config, train_on_one_device, tmp_path):
    train_on_one_device(config, tmp_path / "whole")
    for stop in (2, 3):
        config.context.schedule = ((stop, 32, "full"),)
        train_on_one_device(config, tmp_path / "parts")
    whole, parts = (
        [(r["loss"], r["squared"], r["worst_token"]) for r in read_metrics(folder) if "loss" in r]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts and len(whole) == 3
