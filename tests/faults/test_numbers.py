"""A gradient or loss that is no use changes no parameter, is said, and stops a run that has too
many.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run.cases import bits, steps_saved, trained_leaves

from lljax.data.batch import Field
from lljax.errors import NumericAbort
from lljax.objectives.objective import Loss
from lljax.objectives.sft import SFT
from lljax.objectives.table import OBJECTIVES
from lljax.report.records import read_metrics
from lljax.run.loop import Run

pytestmark = pytest.mark.faults
FAULTS = {"NaN gradient": np.nan, "Inf gradient": np.inf, "loss x 100": 100.0}
CALM, STEPS = 24, 85  # a spike needs so many steps before it
TOO_MANY = 4


def multiplied(pass_, batch):
    """The loss of SFT, and with it the gradient, times the factor of the batch."""
    loss = SFT.loss(pass_, batch)
    return Loss(loss.total * jnp.max(batch["factor"]), loss.sums)


FACTOR = Field(
    "factor",
    dtype=np.float32,
    padding=1.0,
    derive=lambda piece: np.ones(len(piece["tokens"]), np.float32),
)
MULTIPLIED = dataclasses.replace(
    SFT, name="multiplied", fields=(*SFT.fields, FACTOR), loss=multiplied
)


class Faulty(Run):
    """A run whose loss is multiplied in some steps. faults: {step: name of the fault}. states:
    {step: (leaves before, leaves after)}.
    """

    faults: dict[int, str]
    states: dict[int, tuple[list[bytes], list[bytes]]]

    def update(self, stage):
        number, before = len(self.states) + 1, leaves(self.state)
        factor = FAULTS[self.faults[number]] if number in self.faults else 1.0
        self.batch = self.batch | {"factor": np.full_like(self.batch["factor"], factor)}
        metrics = super().update(stage)
        self.states[number] = before, leaves(self.state)
        return metrics


@pytest.fixture
def train(run_config, monkeypatch):
    """train(config, workdir, {step: fault}, states) -> the model; `states` are added to."""
    monkeypatch.setitem(OBJECTIVES, MULTIPLIED.name, MULTIPLIED)
    run_config.objective.name = MULTIPLIED.name
    run_config.context.schedule, run_config.data.valid_fraction = ((STEPS, 32, "full"),), 0.0
    run_config.alarm.spike, run_config.alarm.max_bad_steps = "skip", TOO_MANY
    run_config.checkpoint.every_steps = STEPS

    def train(config, workdir, faults, states):
        run = Faulty(config, workdir, devices=jax.devices()[:1])
        run.faults, run.states = faults, states
        return run.train()

    return train


def leaves(state) -> list[bytes]:
    """Everything that a skipped step must leave as it is: all but the number of steps."""
    return bits((state.trainable, state.optimizer, state.key, state.losses, state.norms))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_no_use_changes_nothing_and_is_recorded(
    run_config, tmp_path, tally, train, accumulate
):
    run_config.training.accumulate = accumulate
    rng, names = np.random.default_rng(accumulate), list(FAULTS)
    faults = {
        int(number): names[i % 3]
        for i, number in enumerate(rng.permutation(np.arange(CALM, STEPS, 2))[:30])
    }
    rows = {name: tally(f"{name}, skipped", 10) for name in names}
    states = {}
    train(run_config, tmp_path, faults, states)
    for record in (r for r in read_metrics(tmp_path) if "loss" in r):
        before, after = states[record["step"]]
        if name := faults.get(record["step"]):
            alarm = record["spike" if name == "loss x 100" else "nonfinite"] and record["skipped"]
            rows[name].case(alarm and before == after, record)
        else:
            assert not record["skipped"] and before != after, record
    for row in rows.values():
        row.done()


@pytest.mark.parametrize("policy,steps", [("skip", TOO_MANY), ("stop", 1)])
@pytest.mark.parametrize("name", FAULTS)
def test_too_many_of_them_stop_a_run_that_goes_on_from_sound_numbers(
    run_config, tmp_path, tally, train, name, policy, steps
):
    row = tally("too many of them: stopped with 70, state saved", 1)
    run_config.alarm.nonfinite = run_config.alarm.spike = policy
    states = {}
    with pytest.raises(NumericAbort, match="state is saved") as stopped:
        train(run_config, tmp_path, dict.fromkeys(range(CALM, STEPS), name), states)
    last = steps_saved(tmp_path)[-1]
    # The same command goes on from there, now without faults.
    model = train(run_config, tmp_path, {}, states)
    kept = states[CALM][0] == states[CALM + steps - 1][1] == states[CALM + steps][0]
    row.case(
        stopped.value.exit_code == 70
        and last == CALM + steps - 1
        and kept
        and len(states) == STEPS
        and all(np.isfinite(x).all() for x in trained_leaves(model)),
        (stopped.value, last, kept),
    )
    row.done()
