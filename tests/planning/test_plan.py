"""The plan of a stage: its step and its evaluation, both compiled, both must fit."""

import dataclasses

import jax
import pytest
from conftest import TINY
from objectives.toy import dense_evaluation

from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.hardware.chips import DEVICES
from lljax.hardware.targets import Target
from lljax.models.spec import from_hf
from lljax.objectives.sft import SFT
from lljax.objectives.table import OBJECTIVES
from lljax.planning import fit, plan

T = 1024
HF = TINY | {"vocab_size": 4096}


@pytest.fixture
def config():
    c = default_config()
    c.context.length, c.context.schedule = T, ((1, T, "full"),)
    c.data.valid_fraction, c.memory.loss_chunk, c.mesh.fsdp, c.memory.tile = 0.1, 32, 1, 128
    return c


@pytest.fixture
def target(monkeypatch):
    """target(bytes of memory): this CPU in the place of a GPU."""
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1])

    def sized(memory):
        device = dataclasses.replace(DEVICES["h100-80g"], memory=int(memory / (1 - plan.MARGIN)))
        return Target("h100-80g", device, 1)

    return sized


def test_the_plan_shows_the_step_and_its_evaluation(config, target):
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    step, evaluation = planned.needs
    assert (
        planned.fits and step.label == f"{T:,} full" and evaluation.label == f"evaluation of {T:,}"
    )
    assert evaluation.temporary < step.temporary and evaluation.optimizer == step.optimizer > 0
    assert planned.tokens == config.training.rows * T and planned.seconds > 0
    assert planned.reason == "one device" and planned.collectives == {}


def test_the_plan_refuses_what_an_evaluation_cannot_hold(config, target, monkeypatch):
    """An objective whose evaluation forms all logits at once: its step fits, its evaluation not."""
    row = dataclasses.replace(SFT, name="dense", evaluate=dense_evaluation)
    monkeypatch.setitem(OBJECTIVES, "dense", row)
    config.objective.name = "dense"
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    step, evaluation = planned.needs
    assert evaluation.peak > 1.2 * step.peak and evaluation.temporary > T * 4096 * 4
    between = (step.peak + evaluation.peak) // 2
    (planned,) = plan.plan(config, HF, target(between), plan.Options())
    assert planned.need.fits(between, 1e12) and not planned.fits
    with pytest.raises(ConfigError, match=f"does not fit: evaluation of {T:,} needs"):
        fit.check(planned.needs, between, 1e12, config, from_hf(HF).layers)


def test_without_held_out_rows_no_evaluation_is_planned(config, target):
    config.data.valid_fraction = 0.0
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    assert planned.evaluation is None and planned.needs == [planned.need] and planned.fits
