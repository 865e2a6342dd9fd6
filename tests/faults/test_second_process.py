"""A run that goes on is left alone by a second process."""

import time

import pytest
from faults.runs import STEPS

pytestmark = pytest.mark.faults


def test_a_second_process_on_the_same_folder_is_refused(whole, new_run, tally):
    row = tally("a second process on the folder of a run", 1)
    run = new_run("run")
    since, first = time.time(), run.fork()
    run.wait_for_step(1, first, since)
    second = new_run("run")
    second.log = run.log.with_name("second.log")
    process = second.fork()
    process.join()
    first.join()
    lines = second.log.read_text().strip().splitlines()
    row.case(
        process.exitcode == 2
        and lines[-1].startswith("ConfigError: ")
        and str(run.workdir) in lines[-1]
        and first.exitcode == 0
        and run.newest() == whole.states[STEPS]
        and run.records() == whole.records,
        (process.exitcode, lines[-1:], first.exitcode),
    )
    row.done()
