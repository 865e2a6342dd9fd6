"""Preference and policy runs that are killed at any moment, also while answers are written."""

import time

import numpy as np
import pytest
from run.cases import write_answers

pytestmark = pytest.mark.faults
KILLS = 10
RUNS = 4 * KILLS  # started at most: a run may be done before its kill


@pytest.mark.parametrize("objective,kind", [("dpo", "pairs"), ("grpo", "prompts")])
def test_killed_at_any_moment_it_ends_as_an_uninterrupted_run(
    objective, kind, new_run, tally, tmp_path
):
    """Every other kill comes a random time after the start, the others after a step."""
    write_answers(tmp_path)
    overrides = [
        f"--config.objective.name={objective}",
        f"--config.data.train=('{tmp_path / kind}.jsonl',)",
        "--config.data.overlong=drop",
        "--config.context.length=96",
        "--config.context.schedule=((30,64,'shifted'),(80,96,'full'))",
        "--config.training.rows=2",
        "--config.training.eval_every=0",
        "--config.checkpoint.every_steps=2",  # a step alone is too short to be hit
    ]
    if kind == "prompts":
        overrides += [
            "--config.rollout.answers=4",
            "--config.rollout.tokens=8",
            "--config.rollout.updates=2",
            "--config.objective.kl_beta=0.04",
            f"--config.reward.functions=(('{tmp_path / 'reward.py'}:letters',1.0),)",
        ]
    row, rng = (
        tally(f"kill -9 of a {objective} run at a random moment", KILLS),
        np.random.default_rng(0),
    )
    whole = new_run("whole", *overrides)
    whole.finish()
    began = time.monotonic()
    new_run("timed", *overrides).fork().join()
    seconds, wanted = time.monotonic() - began, (whole.newest(), whole.records())
    kills = number = 0
    while kills < KILLS:
        assert number < RUNS, f"{kills} kills in {number} runs"
        run, number, before = new_run(f"killed-{number}", *overrides), number + 1, kills
        while kills < KILLS:
            since, process = time.time(), run.fork()
            if kills % 2:
                process.join(rng.uniform(0.3, 1) * seconds)
            else:
                run.wait_for_step(run.last_record() + rng.integers(1, 30), process, since)
                process.join(rng.uniform(0, 0.1))  # within a step, a rollout or a save
            process.kill()
            process.join()
            if process.exitcode == 0:  # it was done before
                break
            kills += 1
        run.finish()
        ended_alike = (run.newest(), run.records()) == wanted
        for kill in range(before, kills):
            row.case(ended_alike, (number, kill))
    row.done()
