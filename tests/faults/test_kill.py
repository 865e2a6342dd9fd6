"""A run that is killed at any moment goes on as if nothing had happened."""

import time

import numpy as np
import pytest
from faults.runs import SAVED_EVERY, STEPS

pytestmark = pytest.mark.faults
KILLS = 50


def test_killed_at_any_moment_a_run_ends_as_an_uninterrupted_one(whole, new_run, tally):
    """Every other kill comes at a random time after the start, the others within or after a random
    step. A run that is done is compared, and the next one begins.
    """
    row, ended, rng = (
        tally("kill -9 at a random moment", KILLS),
        tally("runs restarted after kills until done", 0),
        np.random.default_rng(0),
    )
    kills, number, seconds = 0, 0, None
    while kills < KILLS:
        run, number, before = new_run(f"killed-{number}"), number + 1, 0
        if seconds is None:
            began = time.monotonic()
            new_run("timed").finish()
            seconds = time.monotonic() - began
        while kills < KILLS:
            since, process = time.time(), run.fork()
            if kills % 2:
                process.join(rng.uniform(0, seconds))
            else:
                run.wait_for_step(before + rng.integers(1, 4 * SAVED_EVERY), process, since)
                # within a step, a save, an evaluation, or on to a later step
                process.join(rng.uniform(0, 0.2))
            process.kill()
            process.join()
            if process.exitcode == 0:  # it was done before
                break
            kills += 1
            left, reached = run.newest(), run.last_record()
            # The save of a step waits for the one before it, so that no more than two are lost.
            least = max(before, (reached - 1) // SAVED_EVERY * SAVED_EVERY - SAVED_EVERY)
            row.case(
                left == whole.states[left.step] and run.steps()[-1] == left.step >= least
                if left
                else least <= 0,
                (kills, left and left.step, reached),
            )
            before = left.step if left else 0
        run.finish()
        ended.cases += 1
        ended.case(run.newest() == whole.states[STEPS] and run.records() == whole.records, number)
    row.done()
    ended.done()
