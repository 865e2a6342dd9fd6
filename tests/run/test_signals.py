"""Asked to stop, a run finishes its step, saves, and says with its exit code that it can go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lljax.errors import Stopped
from lljax.run.signals import StopRequest

ALL = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a Python handler runs between two bytecodes


@pytest.mark.parametrize("number", ALL)
def test_before_the_first_step_it_stops_at_once(number):
    with (
        pytest.raises(Stopped, match=f"{signal.Signals(number).name}.*nothing to save") as stopped,
        StopRequest(),
    ):
        send(number)
    assert stopped.value.exit_code == 75


@pytest.mark.parametrize("number", ALL)
def test_between_steps_it_is_a_request_that_the_loop_sees(number):
    with StopRequest() as stop:
        stop.defer(lambda: None)
        assert not stop.requested
        send(number)
        assert stop.requested


def test_while_saving_a_second_term_changes_nothing_and_a_second_ctrl_c_is_taken_at_its_word():
    with StopRequest() as stop:
        stop.defer(lambda: None)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("way_out", [None, Stopped("as asked"), RuntimeError("as it happens")])
def test_the_handlers_before_it_come_back(way_out):
    before = [signal.getsignal(number) for number in ALL]
    try:
        with StopRequest():
            assert [signal.getsignal(number) for number in ALL] != before
            if way_out:
                raise way_out
    except (Stopped, RuntimeError):
        pass
    assert [signal.getsignal(number) for number in ALL] == before


def test_off_the_main_thread_training_runs_without_handlers():
    seen = []

    def work():
        with StopRequest() as stop:
            stop.defer(lambda: None)
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# Without jax, whose import takes seconds.
RUN = """
import ctypes, sys, time, types
sys.modules["lljax.parallel.processes"] = types.SimpleNamespace(any_of=bool, is_script=lambda: True)
from lljax import errors
from lljax.run import signals
with errors.exit_cleanly(), signals.StopRequest({arguments}) as stop:
    {before}
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
    {after}
    raise errors.Stopped("after step 3, state saved")
"""
HANG = "ctypes.CDLL(None).sleep(60)"  # as in a step: the main thread comes to no bytecode


def start(before="stop.defer(lambda: 7)", after="", arguments="", **streams):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(before=before, after=after, arguments=arguments)],
        text=True,
        **streams,
    )
    if "print" not in before:
        assert process.stdout.readline() == "ready\n"
    return process


def stopped(process, *numbers):
    """The exit code, and the lines on stderr."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    return process.communicate(timeout=20)[1].splitlines(), process.returncode


@pytest.mark.parametrize("number", ALL)
def test_a_process_says_at_once_that_it_stops_after_this_step_and_leaves_with_75(number):
    (first, last), code = stopped(start(), number)
    assert first.startswith(f"{number.name}: the run saves and stops after this step")
    assert (last, code) == ("Stopped: after step 3, state saved", 75)


@pytest.mark.parametrize("number", ALL)
def test_a_process_with_nothing_to_save_leaves_with_75_and_one_line(number):
    assert stopped(start(before=""), number) == (
        [f"Stopped: {number.name} before the first step: nothing to save"],
        75,
    )


def test_so_does_one_whose_main_thread_is_in_a_compiler():
    process = start(before="print('ready', flush=True); " + HANG, arguments="grace=0.1")
    assert process.stdout.readline() == "ready\n"
    assert stopped(process, signal.SIGTERM) == (
        ["Stopped: SIGTERM before the first step: nothing to save"],
        75,
    )


def test_a_second_ctrl_c_ends_a_process_that_hangs_without_a_traceback():
    lines, code = stopped(start(after=HANG), signal.SIGINT, signal.SIGINT)
    assert code == 75 and len(lines) == 2
    assert lines[-1].startswith(
        "Stopped: by a second Ctrl-C, without saving: the same command goes on after step 7"
    )


def test_a_second_sigterm_changes_nothing():
    (*_, last), code = stopped(start(after="time.sleep(0.5)"), signal.SIGTERM, signal.SIGTERM)
    assert (last, code) == ("Stopped: after step 3, state saved", 75)


def test_where_nobody_reads_the_log_any_more_it_saves_and_leaves_with_75_too():
    read, write = os.pipe()
    process = start(stderr=write)
    os.close(write)
    os.close(read)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "saved\n" and process.returncode == 75


def test_a_signal_to_a_forked_child_ends_that_and_is_none_to_the_run():
    fork = (
        "import multiprocessing; fork = multiprocessing.get_context('fork'); "
        "child = fork.Process(target=time.sleep, args=[60]); "
    )
    ended = "child.start(); time.sleep(0.3); child.terminate(); child.join(); time.sleep(0.2); "
    ended += "stop.requested = child.exitcode == -15"
    process = start(before=f"stop.defer(lambda: 7); {fork}{ended}")
    assert stopped(process) == (["Stopped: after step 3, state saved"], 75)


def test_a_signal_that_was_ignored_stays_so():
    """nohup has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.defer(lambda: None)
            send(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
