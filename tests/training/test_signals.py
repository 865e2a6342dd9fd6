"""Asked to stop, a run finishes its step, saves, and says with its exit code that it can go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lljax.errors import Stopped
from lljax.training.signals import StopRequest

BOTH = (signal.SIGTERM, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)                         # a Python handler runs between two bytecodes


@pytest.mark.parametrize("number", BOTH)
def test_before_the_first_step_it_stops_at_once(number):
    with pytest.raises(Stopped, match=f"{signal.Signals(number).name}.*nothing to save") as stopped, StopRequest():
        send(number)
    assert stopped.value.exit_code == 75


@pytest.mark.parametrize("number", BOTH)
def test_between_steps_it_is_a_request_that_the_loop_sees(number):
    with StopRequest() as stop:
        stop.defer()
        assert not stop.requested
        send(number)
        assert stop.requested


def test_while_saving_a_second_term_changes_nothing_and_a_second_ctrl_c_is_taken_at_its_word():
    with StopRequest() as stop:
        stop.defer()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("way_out", [None, Stopped("as asked"), RuntimeError("as it happens")])
def test_the_handlers_before_it_come_back(way_out):
    before = [signal.getsignal(number) for number in BOTH]
    try:
        with StopRequest():
            assert [signal.getsignal(number) for number in BOTH] != before
            if way_out:
                raise way_out
    except (Stopped, RuntimeError):
        pass
    assert [signal.getsignal(number) for number in BOTH] == before


def test_off_the_main_thread_training_runs_without_handlers():
    seen = []

    def work():
        with StopRequest() as stop:
            stop.defer()
            seen.append(stop.requested)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


RUN = """
import time
from lljax.errors import Stopped, exit_cleanly
from lljax.training.signals import StopRequest
with exit_cleanly(), StopRequest() as stop:
    {defer}
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
    raise Stopped("stopped after step 3, state saved")
"""


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("defer,saved", [("stop.defer()", "saved\n"), ("pass", "")])
def test_a_process_leaves_with_75_and_one_line(number, defer, saved):
    process = subprocess.Popen([sys.executable, "-c", RUN.format(defer=defer)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, saved)
    assert err.startswith("Stopped: ") and err.count("\n") == 1
