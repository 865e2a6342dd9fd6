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
from flax import nnx

from lljax.errors import ConfigError, NumericAbort, Stopped
from lljax.models import lora
from lljax.parallel.sharding import put
from lljax.planning import fit
from lljax.report.records import read_metrics
from lljax.run import loop
from lljax.run.monitor import Monitor
from lljax.training.step import robust_z

TIMES = ("seconds", "tokens_per_second", "data_seconds")


@pytest.fixture
def bad(monkeypatch):
    """The numbers, from 0 in the order of reading, of batches whose loss is a hundred times that of
    the steps before.
    """
    bad, seen, compile_step = set(), {}, fit.compile_step

    def compiled(*arguments):
        need, program = compile_step(*arguments)

        def step(state, frozen, batch):
            key = np.asarray(batch["tokens"]).tobytes()
            if seen.setdefault(key, len(seen)) not in bad:
                return program(state, frozen, batch)
            before, where = np.asarray(state.losses).copy(), state.losses.sharding
            low = put(np.full(before.shape, np.log(0.05), np.float32), where)
            after, metrics = program(dataclasses.replace(state, losses=low), frozen, batch)
            return dataclasses.replace(after, losses=put(before, where)), metrics

        return need, step

    monkeypatch.setattr(fit, "compile_step", compiled)
    return bad


@pytest.fixture
def config(run_config, one_device):
    run_config.context.schedule, run_config.checkpoint.every_steps = ((8, 32, "full"),), 3
    run_config.alarm.spike, run_config.data.valid_fraction = "rollback", 0.0
    return run_config


def records(workdir):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(workdir)]


def leaves(model):
    return [
        np.asarray(x)
        for x in jax.tree.leaves(nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1]))
    ]


def steps_saved(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("factor,alarms", [(1.2, False), (100.0, True)])
def test_a_loss_a_hundred_times_above_the_recent_ones_alarms(factor, alarms):
    recent = jnp.log(2.0 + 0.1 * jax.random.normal(jax.random.key(0), (64,)))
    assert (robust_z(jnp.log(2.0 * factor), recent) > 6.0) == alarms


@pytest.mark.slow
def test_rollbacks_to_one_checkpoint_have_an_end_with_the_state_saved(config, tmp_path, bad, capfd):
    config.alarm.max_bad_steps = 2
    bad |= {4, 5, 6}
    with pytest.raises(
        NumericAbort, match=r"step 4: loss \d.*deviations above its median; .*state is saved"
    ):
        loop.train(config, tmp_path)
    told = records(tmp_path)
    assert [record["step"] for record in told] == [1, 2, 3, 4] and steps_saved(tmp_path) == [3, 4]
    assert [(each["to"], each["from"]) for each in told[-1]["rollbacks"]] == [(3, 5), (3, 4)]
    assert told[-1]["spike"] and told[-1]["skipped"] and told[-1]["rollbacks"][0]["loss_z"] > 6
    assert "step 5: back to step 3" in capfd.readouterr().err


class Killed(Exception):
    pass


@pytest.mark.slow
def test_stopped_and_killed_around_rollbacks_is_bitwise_an_uninterrupted_run(
    config, tmp_path, bad, monkeypatch
):
    config.context.schedule = ((6, 32, "shifted"), (12, 64, "full"))
    bad |= {4, 7, 13, 19}  # among them the last of each stage
    whole = loop.train(config, tmp_path / "whole")
    told = records(tmp_path / "whole")
    assert [record["step"] for record in told] == list(range(1, 13))
    assert {
        record["step"]: [each["from"] for each in record["rollbacks"]]
        for record in told
        if "rollbacks" in record
    } == {4: [5, 6], 7: [9], 10: [12]}
    assert not any(record["spike"] for record in told)

    recorded, interruptions = (
        Monitor.step,
        [
            ("stop", 4, 0),
            ("kill", 4, 1),
            ("stop", 4, 1),
            ("stop", 5, 2),
            ("stop", 11, 0),
            ("kill", 10, 1),
            ("stop", 10, 1),
        ],
    )

    def step(self, record):
        recorded(self, record)
        how, number, rollbacks = interruptions[0] if interruptions else ("", 0, 0)
        if (
            record["step"],
            len(
                [
                    r
                    for m in read_metrics(self.path.parent)
                    for r in m.get("rollbacks", ())
                    if r["to"] == (3 if number < 7 else 9)
                ]
            ),
        ) == (number, rollbacks):
            interruptions.pop(0)
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Monitor, "step", step)
    while interruptions:
        left = len(interruptions)
        with pytest.raises((Stopped, Killed)):
            loop.train(config, tmp_path / "parts")
        assert len(interruptions) == left - 1
    parts = loop.train(config, tmp_path / "parts")
    for x, y in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_array_equal(x, y)
    assert records(tmp_path / "parts") == told


@pytest.mark.slow
def test_without_a_checkpoint_of_the_stage_a_spike_is_skipped_and_a_good_step_goes_on(
    config, tmp_path, bad
):
    bad |= {1}
    loop.train(config, tmp_path)
    told = records(tmp_path)
    assert [record["skipped"] for record in told] == [False, True] + [False] * 6 and len(told) == 8


@pytest.mark.slow
def test_after_the_last_rollback_the_same_command_goes_on_and_another_interval_is_refused(
    config, tmp_path, bad
):
    config.alarm.max_bad_steps = 1
    bad |= {4, 5}
    with pytest.raises(NumericAbort):
        loop.train(config, tmp_path)
    config.checkpoint.every_steps = 2
    with pytest.raises(ConfigError, match="another checkpoint.every_steps"):
        loop.train(config, tmp_path)
    config.checkpoint.every_steps = 3
    loop.train(config, tmp_path)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    note = json.loads((tmp_path / "checkpoints" / "8" / "note" / "metadata").read_text())
    assert [(each["to"], each["from"]) for each in note["loader"]["rollbacks"]] == [(3, 5)]
