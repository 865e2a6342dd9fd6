"""A gradient or loss that is no use changes no parameter, is said, and stops a run that has too
many.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.errors import NumericAbort
from lljax.models import lora
from lljax.parallel.sharding import make_mesh, replicated
from lljax.report.records import read_metrics
from lljax.run import loop
from lljax.run.checkpoint import Checkpoints
from lljax.training import step

pytestmark = pytest.mark.faults
FAULTS = {"NaN gradient": jnp.nan, "Inf gradient": jnp.inf, "loss x 100": 100.0}
CALM, STEPS = 24, 85  # a spike is one beside the steps before it, and they must be so many
TOO_MANY = 4


@pytest.fixture
def inject(run_config, monkeypatch):
    """inject({step: fault}) -> {step: (state before, state after)}, of the runs that follow: in the
    compiled step, loss and gradients are multiplied by what the fault says.
    """
    run_config.context.schedule, run_config.data.valid_fraction = ((STEPS, 32, "full"),), 0.0
    run_config.alarm.spike, run_config.alarm.max_bad_steps, run_config.checkpoint.every_steps = (
        "skip",
        TOO_MANY,
        STEPS,
    )
    place, abstract_batch, accumulate, compiled = (
        loop.place,
        loop.abstract_batch,
        step.accumulate,
        loop._compile,
    )
    faults, states = {}, {}

    def placed(batch, times, mesh, layout):
        factor = FAULTS[faults[len(states) + 1]] if len(states) + 1 in faults else 1.0
        return place(batch, times, mesh, layout) | {
            "factor": jax.device_put(np.float32(factor), replicated(mesh))
        }

    def abstract_placed(times, rows, length, mesh):
        factor = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
        return abstract_batch(times, rows, length, mesh) | {"factor": factor}

    def multiplied(loss_of, trainable, frozen, batch, key):
        batch = dict(batch)
        factor = batch.pop("factor")
        (loss, more), grads = accumulate(loss_of, trainable, frozen, batch, key)
        return (loss * factor, more), jax.tree.map(lambda g: g * factor, grads)

    def watched(*arguments):
        def watch(program):
            def run(state, frozen, batch):
                before = leaves(state)
                after, metrics = program(state, frozen, batch)
                states[len(states) + 1] = before, leaves(after)
                return after, metrics

            return run

        programs, evaluations = compiled(*arguments)
        return {number: watch(program) for number, program in programs.items()}, evaluations

    for module, name, value in (
        (loop, "place", placed),
        (loop, "abstract_batch", abstract_placed),
        (step, "accumulate", multiplied),
        (loop, "_compile", watched),
        (loop, "mesh_of", lambda mesh: make_mesh(devices=jax.devices()[:1])),
    ):
        monkeypatch.setattr(module, name, value)

    def begin(chosen):
        faults.clear()
        faults.update(chosen)
        return states

    return begin


def leaves(state) -> list[bytes]:
    """What a step that is skipped must leave as it is: all but how many there were."""
    return [
        np.asarray(x).tobytes()
        for x in jax.tree.leaves(
            (state.trainable, state.optimizer, state.key, state.losses, state.norms)
        )
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_no_use_changes_nothing_and_is_recorded(
    run_config, tmp_path, tally, inject, accumulate
):
    run_config.training.accumulate = accumulate
    rng, names = np.random.default_rng(accumulate), list(FAULTS)
    faults = {
        int(number): names[i % 3]
        for i, number in enumerate(rng.permutation(np.arange(CALM, STEPS, 2))[:30])
    }
    rows = {name: tally(f"{name}, skipped", 10) for name in names}
    states = inject(faults)
    loop.train(run_config, tmp_path)
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
    run_config, tmp_path, tally, inject, name, policy, steps
):
    row = tally("too many of them: stopped with 70, state saved", 1)
    run_config.alarm.nonfinite = run_config.alarm.spike = policy
    states = inject(dict.fromkeys(range(CALM, STEPS), name))
    with pytest.raises(NumericAbort, match="state is saved") as stopped:
        loop.train(run_config, tmp_path)
    checkpoints = Checkpoints(tmp_path, every_steps=1, every_minutes=1, keep=1, read_only=True)
    last = checkpoints.steps()[-1]
    checkpoints.close()
    # The same command goes on from there; that nothing goes wrong again is for the test to arrange.
    inject({})
    model = loop.train(run_config, tmp_path)
    kept = states[CALM][0] == states[CALM + steps - 1][1] == states[CALM + steps][0]
    trained = jax.tree.leaves(nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1]))
    row.case(
        stopped.value.exit_code == 70
        and last == CALM + steps - 1
        and kept
        and len(states) == STEPS
        and all(np.isfinite(x).all() for x in trained),
        (stopped.value, last, kept),
    )
    row.done()
