"""The plan of a stage: its step, its rollout and its evaluation, all compiled, all must fit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from objectives.toy import dense_evaluation

from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.hardware.chips import DEVICES
from lljax.hardware.targets import Target
from lljax.models.cache import cache_bytes
from lljax.models.families import spec_from_hf
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
        fit.check(planned.needs, between, 1e12, config, spec_from_hf(HF).layers)


def test_without_held_out_rows_no_evaluation_is_planned(config, target):
    config.data.valid_fraction = 0.0
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    assert planned.needs == [planned.need] and planned.fits


# ---------------------------------------------------------------- rollouts
def policy(config, *, length, answers, tokens):
    """The configuration of a policy in float32, whose arrays a CPU does not convert."""
    c = config.copy_and_resolve_references()
    c.objective.name, c.model.dtype, c.data.overlong = "grpo", "float32", "drop"
    c.context.length, c.context.schedule = length, ((1, length, "full"),)
    c.rollout.answers, c.rollout.tokens = answers, tokens
    return c


def test_the_plan_of_a_policy_shows_its_rollout(config, target):
    """A prompt of 1,024 tokens has as many slots; of the row's 1,040, it would have 2,048."""
    config = policy(config, length=1040, answers=4, tokens=16)
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    step, reading, writing = planned.needs
    assert planned.fits and [need.label for need in planned.others] == [
        "rollout, reading, 1,040 full",
        "rollout, writing, 1,040 full",
    ]
    spec = spec_from_hf(HF)
    trunk, own = cache_bytes(spec, 1024, jnp.float32), cache_bytes(spec, 16, jnp.float32)
    held = step.base + step.trainable + step.optimizer
    assert step.optimizer > 0 and not step.writes and reading.writes and writing.writes
    read, write = (need.peak - need.temporary - held for need in (reading, writing))
    logits = 4 * spec.V
    assert trunk <= read < 1.2 * trunk + logits
    assert trunk + 4 * own <= write < 1.2 * (trunk + 4 * own) + 4 * logits


def test_a_rollout_has_the_cache_and_the_reference_of_its_run(config, target):
    config = policy(config, length=1040, answers=4, tokens=16)
    plans = []
    for changes in ({}, {"rollout.cache": "int8"}, {"objective.kl_beta": 0.1}):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        plans.append(plan.plan(changed, HF, target(1e12), plan.Options())[0].needs)
    full, int8, referenced = ([need for need in needs if need.writes] for needs in plans)
    spec = spec_from_hf(HF)
    saved = cache_bytes(spec, 1024, jnp.float32) - cache_bytes(spec, 1024, jnp.int8)
    kept = [need.peak - need.temporary for need in (full[0], int8[0], referenced[0])]
    assert kept[0] - kept[1] == pytest.approx(saved, rel=0.05)
    assert kept[2] - kept[0] == full[0].trainable > 0
    assert plans[2][1].label == "log-probabilities, 1,040 full"


def test_the_plan_refuses_a_rollout_that_does_not_fit(config, target):
    """64 answers need more than the step on a row that holds one."""
    config = policy(config, length=1024, answers=64, tokens=513)
    config.training.accumulate = 64
    (planned,) = plan.plan(config, HF, target(1e12), plan.Options())
    step, _, writing = planned.needs
    assert writing.peak > 1.2 * step.peak
    between = (step.peak + writing.peak) // 2
    (planned,) = plan.plan(config, HF, target(between), plan.Options())
    assert planned.need.fits(between, 1e12) and not planned.fits
    with pytest.raises(
        ConfigError, match="rollout, writing, 1,024 full needs .*: set rollout.cache='int8', or"
    ):
        fit.check(planned.needs, between, 1e12, config, spec_from_hf(HF).layers)
    config.rollout.cache = "int8"
    assert fit.advice(config, spec_from_hf(HF).layers, writes=True).startswith("spread it over")


def test_a_stage_without_room_for_prompts_is_refused_before_it_is_compiled(config, target):
    config = policy(config, length=512, answers=2, tokens=512)
    with pytest.raises(ConfigError, match="tokens=512 .* a stage of 512 .* no room for a prompt"):
        plan.plan(config, HF, target(1e12), plan.Options())
