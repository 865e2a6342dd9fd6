"""A run that meets a bad batch goes back to a checkpoint and on without it, and ends the same
however often it is stopped.
"""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run.cases import records, steps_saved, trained_leaves

from lljax.errors import ConfigError, NumericAbort, Stopped
from lljax.parallel.sharding import put
from lljax.report.records import read_metrics
from lljax.run.loop import Run
from lljax.run.observer import Observer
from lljax.training.step import robust_z


class BadBatches(Run):
    """A run in which some batches have a loss a hundred times the loss of the steps before.

    bad: the numbers of these batches, from 0 in the order of reading. seen: number of every batch.
    """

    bad: set[int]
    seen: dict[bytes, int]

    def update(self, stage):
        key = self.batch["tokens"].tobytes()
        if self.seen.setdefault(key, len(self.seen)) not in self.bad:
            return super().update(stage)
        before, sharding = np.asarray(self.state.losses).copy(), self.state.losses.sharding
        low = put(np.full(before.shape, np.log(0.05), np.float32), sharding)
        self.state = dataclasses.replace(self.state, losses=low)
        metrics = super().update(stage)
        self.state = dataclasses.replace(self.state, losses=put(before, sharding))
        return metrics


@pytest.fixture
def train():
    """train(config, workdir, bad, *observers): with the batches `bad`."""
    seen = {}

    def train(config, workdir, bad, *observers):
        run = BadBatches(config, workdir, observers=observers, devices=jax.devices()[:1])
        run.bad, run.seen = bad, seen
        return run.train()

    return train


@pytest.fixture
def config(run_config):
    run_config.context.schedule, run_config.checkpoint.every_steps = ((8, 32, "full"),), 3
    run_config.alarm.spike, run_config.data.valid_fraction = "rollback", 0.0
    return run_config


@pytest.mark.parametrize("factor,alarms", [(1.2, False), (100.0, True)])
def test_a_loss_a_hundred_times_above_the_recent_ones_alarms(factor, alarms):
    recent = jnp.log(2.0 + 0.1 * jax.random.normal(jax.random.key(0), (64,)))
    assert (robust_z(jnp.log(2.0 * factor), recent) > 6.0) == alarms


@pytest.mark.slow
def test_rollbacks_to_one_checkpoint_have_an_end_with_the_state_saved(
    config, tmp_path, train, capfd
):
    config.alarm.max_bad_steps = 2
    bad = {4, 5, 6}
    with pytest.raises(
        NumericAbort, match=r"step 4: loss \d.*deviations above its median; .*state is saved"
    ):
        train(config, tmp_path, bad)
    steps = records(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and steps_saved(tmp_path) == [3, 4]
    assert [(each["to"], each["from"]) for each in steps[-1]["rollbacks"]] == [(3, 5), (3, 4)]
    assert steps[-1]["spike"] and steps[-1]["skipped"]
    assert steps[-1]["rollbacks"][0]["loss_z"] > 6
    assert "step 5: back to step 3" in capfd.readouterr().err


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved."""


class Interrupts(Observer):
    """Interrupts a run when it comes for the n-th time to a step: (how, step, rollbacks before)."""

    def __init__(self, interruptions, workdir):
        self.interruptions, self.workdir = interruptions, workdir

    def step(self, record):
        how, step, rollbacks = self.interruptions[0] if self.interruptions else ("", 0, 0)
        target = 3 if step < 7 else 9
        before = sum(
            rollback["to"] == target
            for other in read_metrics(self.workdir)
            for rollback in other.get("rollbacks", ())
        )
        if (record["step"], before) == (step, rollbacks):
            self.interruptions.pop(0)
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_stopped_and_killed_around_rollbacks_is_bitwise_an_uninterrupted_run(
    config, tmp_path, train
):
    config.context.schedule = ((6, 32, "shifted"), (12, 64, "full"))
    bad = {4, 7, 13, 19}  # among them the last of each stage
    whole = train(config, tmp_path / "whole", bad)
    wanted = records(tmp_path / "whole")
    assert [record["step"] for record in wanted] == list(range(1, 13))
    assert {
        record["step"]: [rollback["from"] for rollback in record["rollbacks"]]
        for record in wanted
        if "rollbacks" in record
    } == {4: [5, 6], 7: [9], 10: [12]}
    assert not any(record["spike"] for record in wanted)

    interruptions = [
        ("stop", 4, 0),
        ("kill", 4, 1),
        ("stop", 4, 1),
        ("stop", 5, 2),
        ("stop", 11, 0),
        ("kill", 10, 1),
        ("stop", 10, 1),
    ]
    interrupts = Interrupts(interruptions, tmp_path / "parts")
    while interruptions:
        left = len(interruptions)
        with pytest.raises((Stopped, Killed)):
            train(config, tmp_path / "parts", bad, interrupts)
        assert len(interruptions) == left - 1
    parts = train(config, tmp_path / "parts", bad)
    for x, y in zip(trained_leaves(whole), trained_leaves(parts), strict=True):
        np.testing.assert_array_equal(x, y)
    assert records(tmp_path / "parts") == wanted


@pytest.mark.slow
def test_without_a_checkpoint_of_the_stage_a_spike_is_skipped_and_a_good_step_goes_on(
    config, tmp_path, train
):
    train(config, tmp_path, {1})
    steps = records(tmp_path)
    assert [record["skipped"] for record in steps] == [False, True] + [False] * 6


@pytest.mark.slow
def test_after_the_last_rollback_the_same_command_goes_on_and_another_interval_is_refused(
    config, tmp_path, train
):
    config.alarm.max_bad_steps = 1
    bad = {4, 5}
    with pytest.raises(NumericAbort):
        train(config, tmp_path, bad)
    config.checkpoint.every_steps = 2
    with pytest.raises(ConfigError, match="another checkpoint.every_steps"):
        train(config, tmp_path, bad)
    config.checkpoint.every_steps = 3
    train(config, tmp_path, bad)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    note = json.loads((tmp_path / "checkpoints" / "8" / "note" / "metadata").read_text())
    assert [(each["to"], each["from"]) for each in note["loader"]["rollbacks"]] == [(3, 5)]
