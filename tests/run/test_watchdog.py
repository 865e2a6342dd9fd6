"""A process in which nothing moves ends with an exit code of its own and says where it hung; a
process that moves is left alone.
"""

import re
import subprocess
import sys
import time

import pytest
from run.cases import Heard, run_info

from lljax.config import default_config, validate
from lljax.errors import ConfigError, Stalled
from lljax.run.watchdog import TICKS, Watchdog

# Without jax, whose import takes seconds.
SCRIPT = """
import ctypes, time, types
from lljax.run.watchdog import Watchdog
def hang(*_):
    ctypes.CDLL(None).sleep(60)
watchdog = Watchdog(seconds=0.1, last_words=0.1)
watchdog.open(types.SimpleNamespace(step=3, last_checkpoint={last_checkpoint}))
{body}
"""


def run(body: str, last_checkpoint: str = "lambda: 2") -> subprocess.CompletedProcess:
    script = SCRIPT.format(body=body, last_checkpoint=last_checkpoint)
    return subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, timeout=60
    )


def test_a_main_thread_that_hangs_in_c_ends_with_its_stack_and_one_line():
    done = run("watchdog.heartbeat(7); hang()")
    assert done.returncode == Stalled.exit_code == 74
    assert "in hang" in done.stderr and "in watch" in done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"Stalled: nothing was finished for 0\.\d+ minutes \(alarm.stall_minutes\) after step 7.*",
        line,
    )
    assert "goes on after step 2" in line


def test_a_process_whose_last_words_hang_too_ends():
    assert run("hang()", last_checkpoint="hang").returncode == 74


class Ends(Watchdog):
    """Counts its ends, and waits for `ticks` in place of time: True for a tick with a heartbeat."""

    def __init__(self, ticks: list[bool]):
        super().__init__(seconds=60.0, wait=self.tick)
        self.ticks, self.waits, self.ends = iter(ticks), [], 0

    def tick(self, seconds: float) -> bool:
        self.waits.append(seconds)
        beats = next(self.ticks, None)
        if beats:
            self.heartbeat(1)
        return beats is None

    def end(self, minutes: float) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    "ticks,ends",
    [
        ([False] * (TICKS - 1), 0),
        ([False] * TICKS, 1),
        ([*[False] * (TICKS - 1), True] * 3, 0),
        ([True, *[False] * TICKS], 1),
        ([], 0),
    ],
)
def test_so_many_ticks_without_a_heartbeat_end_a_run(ticks, ends):
    dog = Ends(ticks)
    dog.watch()
    assert dog.ends == ends and set(dog.waits) == {60.0 / TICKS}


def test_a_process_that_was_suspended_has_missed_one_tick():
    """Ticks are counted, not the time between them."""
    dog = Ends([False] * (TICKS - 2))
    tick, dog.waits = dog.tick, []
    dog._wait = lambda seconds: tick(seconds) if len(dog.waits) != 5 else tick(3600.0)
    dog.watch()
    assert not dog.ends


def test_the_end_of_the_run_ends_the_thread_and_0_minutes_start_none(tmp_path):
    config = default_config()
    config.alarm.stall_minutes = 0.0
    off, on = Watchdog(), Watchdog(seconds=60.0)
    for dog in (off, on):
        dog.open(run_info(tmp_path, config=config))
    assert on._thread.is_alive() and not off._thread.is_alive()
    for dog in (off, on):
        dog.close(None)
    on._thread.join(5)
    assert not on._thread.is_alive()


def test_the_clock_on_the_wall_is_not_read(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the watchdog read the wall clock"))
    dog = Ends([False] * TICKS)
    dog.watch()
    assert dog.ends == 1


@pytest.mark.slow
def test_a_run_beats_after_each_step_evaluation_batch_and_save(
    run_config, train_on_one_device, tmp_path
):
    run_config.context.schedule, run_config.training.eval_every = ((3, 32, "full"),), 2
    run_config.data.valid_fraction = 0.4
    heard = Heard()
    train_on_one_device(run_config, tmp_path, observers=[heard])
    beats = [step for _, step in heard.of("heartbeat")]
    assert all(beats.count(step) >= least for step, least in ((1, 1), (2, 2), (3, 4)))
    assert beats == sorted(beats)


@pytest.mark.parametrize("minutes", [-1.0, 0.5])
def test_a_limit_that_a_slow_step_would_reach_is_refused(minutes):
    config = default_config()
    config.alarm.stall_minutes = minutes
    with pytest.raises(ConfigError, match="alarm.stall_minutes"):
        validate(config)
