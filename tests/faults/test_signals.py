"""Asked to stop at any moment, a run leaves soon, with its state saved, and goes on as if nothing
had happened.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults.runs import STEPS, alive

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="asks /proc who takes a signal"),
]
SIGNALS, SECONDS = 20, 10


def takes_the_signal(process) -> bool:
    """Python is up and has read the first lines of the script: before, the system ends a process as
    it likes.
    """
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(caught and int(caught[1], 16) >> signal.SIGTERM - 1 & 1)


def test_terminated_at_any_moment_a_run_is_saved_and_goes_on(whole, new_run, tally):
    """A third of the signals comes while a process imports, compiles and reads, the others within
    or after a random step.
    """
    row, ended, rng = (
        tally("SIGTERM at a random moment", SIGNALS),
        tally("runs resumed after SIGTERM until done", 0),
        np.random.default_rng(1),
    )
    sent, number, starting = 0, 0, 10.0
    while sent < SIGNALS:
        run, number = new_run(f"terminated-{number}"), number + 1
        while sent < SIGNALS:
            before, began, since, process = (
                run.last_record(),
                time.monotonic(),
                time.time(),
                run.start(),
            )
            while alive(process) and not takes_the_signal(process):
                time.sleep(0.005)
            early = sent % 3 == 0
            if early:
                wait(process, rng.uniform(0, starting))
            else:
                run.wait_for_step(before + rng.integers(1, 20), process, since)
                starting = time.monotonic() - began
                wait(process, rng.uniform(0, 0.2))
            if not alive(process):
                assert process.returncode == 0, run.last_line()
                break
            process.terminate()
            seconds, code, left, line = (
                leaves_in(process),
                process.returncode,
                run.newest(),
                run.last_line(),
            )
            sent += 1
            saved = left == whole.states[left.step] if left and left.step in whole.states else True
            # Nothing that was recorded is lost.
            saved &= (left.step if left else 0) == run.last_record()
            said = code == 0 or line.startswith("Stopped: ")
            row.case(
                code in (0, 75) and seconds < SECONDS and saved and said,
                (sent, early, code, seconds, left and left.step, run.last_record(), line),
            )
        run.finish()
        ended.cases += 1
        ended.case(run.newest() == whole.states[STEPS] and run.records() == whole.records, number)
    row.done()
    ended.done()


def leaves_in(process) -> float:
    """Seconds until it is gone, without those in which its main thread waited for a core that
    others had.
    """
    began, first, last = time.monotonic(), queued(process), None
    while alive(process):
        last = queued(process) or last
        time.sleep(0.01)
    return time.monotonic() - began - (last or first) + first


def queued(process) -> float:
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # it is gone
        return 0.0


def wait(process, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
