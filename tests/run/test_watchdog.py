"""A process in which nothing moves ends with a code of its own, says where it hung, and one that
moves is left alone.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from lljax.config import default_config, validate
from lljax.errors import ConfigError, Stalled
from lljax.run import loop, watchdog
from lljax.run.watchdog import Watchdog

# Without jax, whose import takes seconds.
SCRIPT = """
import ctypes, os, sys, time
from lljax.run import watchdog as module
def hang():
    ctypes.CDLL(None).sleep(60)
with module.Watchdog(1.0, step=3, last_checkpoint=lambda: 2) as watchdog:
    print("begins", flush=True)
    {body}
"""


def start(body):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "begins\n"
    return process


def test_a_main_thread_that_hangs_in_c_ends_with_its_stack_and_one_line():
    process = start("watchdog.alive(7); hang()")
    _, said = process.communicate(timeout=20)
    assert process.returncode == Stalled.exit_code == 74
    assert "in hang" in said and "_watch" in said
    told = said.splitlines()[-1]
    assert re.fullmatch(
        r"Stalled: nothing was finished for 0\.\d+ minutes \(alarm.stall_minutes\) after step 7, .*",
        told,
    )
    assert "goes on after step 2" in told


def test_where_even_the_last_words_hang_it_ends():
    process = start(
        "module.LAST_WORDS = 0.2; watchdog._last_checkpoint = lambda: time.sleep(60); hang()"
    )
    assert process.wait(timeout=20) == 74
    process.communicate()


def test_one_that_moves_and_one_that_was_suspended_are_left_alone():
    process = start("for i in range(40): time.sleep(0.05); watchdog.alive(i)")
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=20) == 0
    process.communicate()


def test_a_wall_clock_that_jumps_and_the_end_of_the_run_change_nothing(monkeypatch):
    ended, jumps, wall = [], itertools.cycle([86_400, 0, -86_400]), time.time
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "time", lambda: wall() + next(jumps))
    with Watchdog(2.0, step=0, last_checkpoint=lambda: None) as dog:
        time.sleep(0.5)  # five ticks
    with Watchdog(0.0, step=0, last_checkpoint=lambda: None) as off:
        time.sleep(0.2)
    dog._thread.join(5)
    assert not ended and not dog._thread.is_alive() and not off._thread.is_alive()


@pytest.mark.slow
def test_the_loop_says_that_it_lives_after_each_step_evaluation_batch_and_save(
    run_config, one_device, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(watchdog.Watchdog, "alive", lambda self, step: said.append(step))
    run_config.context.schedule, run_config.training.eval_every = ((3, 32, "full"),), 2
    run_config.data.valid_fraction = 0.4
    loop.train(run_config, tmp_path)
    assert [said.count(step) >= least for step, least in ((1, 1), (2, 2), (3, 4))] == [
        True
    ] * 3 and said == sorted(said)


@pytest.mark.parametrize("minutes", [-1.0, 0.5])
def test_a_limit_that_a_slow_step_would_reach_is_refused(minutes):
    config = default_config()
    config.alarm.stall_minutes = minutes
    with pytest.raises(ConfigError, match="alarm.stall_minutes"):
        validate(config)
