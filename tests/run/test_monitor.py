"""metrics.jsonl equals the file of an uninterrupted run, whatever happened in between."""

import contextlib
import itertools
import json
import math
import os
import struct
import sys
import time

import pytest
from run.cases import run_info

from lljax.report.records import read_metrics
from lljax.run.monitor import Monitor, TimeLeft


def record(step, **changes):
    return {
        "step": step,
        "stage": 0,
        "length": 512,
        "attention": "shifted",
        "loss": 3.0 + 1 / step,
        "grad_norm": 0.1 * step,
        "learning_rate": 1e-4,
        "tokens": 500.0,
        "z": 0.0,
        "nonfinite": False,
        "spike": False,
        "skipped": False,
        "bad": 0,
        "tokens_per_second": 12345.6,
        "seconds": 0.25,
    } | changes


def run(workdir, steps, *, start=0, total=10, evaluations=()):
    workdir.mkdir(exist_ok=True)
    with opened(workdir, step=start, total=total) as monitor:
        for step in steps:
            monitor.step(record(step))
            if step in evaluations:
                monitor.evaluation(step, {"loss@512": 2.0 + 1 / step, "perplexity@512": math.e})


@contextlib.contextmanager
def opened(workdir, monitor=None, **facts):
    monitor = monitor or Monitor()
    monitor.open(run_info(workdir, **facts))
    yield monitor
    monitor.close(None)


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", range(1, 11), evaluations=(3, 6, 9))
    run(tmp_path / "cut", range(1, 9), evaluations=(3, 6, 9))
    # the checkpoint was of step 6
    run(tmp_path / "cut", range(7, 11), start=6, evaluations=(3, 6, 9))
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
    assert len(read_metrics(tmp_path / "cut")) == 13


def test_a_run_that_begins_anew_keeps_nothing(tmp_path):
    run(tmp_path, range(1, 6))
    run(tmp_path, range(1, 3))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_each_step_is_on_disk_when_the_call_returns(tmp_path):
    with opened(tmp_path, total=9) as monitor:
        for step in (1, 2, 3):
            monitor.step(record(step))
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


def test_a_line_cut_short_by_a_kill_is_dropped_on_resume(tmp_path):
    run(tmp_path, range(1, 5))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 2.')
    run(tmp_path, range(5, 7), start=4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "lo\xd3s": 2.0}',
        b'{"step": 2, "loss": 2.',
        b"5",
        b"{}",
        b'{"step": "2"}',
        b'{"step": true}',
        b"[" * 100_000,
        b'{"step": 2}\xe2\x80\xa8{"step": 3}',
    ],
)
def test_a_damaged_line_is_passed_over_with_a_warning_and_those_after_it_stay(
    tmp_path, damage, caplog
):
    run(tmp_path, range(1, 5))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    lines[1] = damage
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3, 4]
    assert "skipped 1 damaged lines (the first is line 2)" in caplog.text
    run(tmp_path, range(5, 6), start=4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3, 4, 5]


def test_a_log_that_nobody_reads_stops_nothing(tmp_path, monkeypatch):
    read, write = os.pipe()
    with open(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        os.close(read)
        run(tmp_path, range(1, 3), evaluations=(2,))
        assert len(read_metrics(tmp_path)) == 3
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_the_time_left_counts_the_stages_to_come():
    """By their FLOPs, corrected by measured steps and by the time between steps."""
    now = [0.0]
    left = TimeLeft([(10, 1e12), (20, 4e12), (30, 8e12)], lambda: now[0])
    estimates = []
    for step in range(1, 21):
        # the first warms up; 5 where 4 was to be expected
        seconds = 9.0 if step == 1 else 1.0 if step <= 10 else 5.0
        now[0] += seconds
        estimates.append(left.after(step, seconds))
    assert estimates[2] == pytest.approx(7 + 40 + 80) and estimates[9] == pytest.approx(40 + 80)
    assert estimates[10] == pytest.approx(9 * 5 + 100) and estimates[19] == pytest.approx(100)
    now[0] += sum([9.0, *[1.0] * 9, *[5.0] * 10])  # as long again between the steps
    assert left.after(20, 5.0) == pytest.approx(2 * 100, rel=0.1)


def test_a_rollback_leaves_the_file_of_a_run_that_never_went_further(tmp_path, capfd):
    run(tmp_path / "straight", range(1, 7))
    (tmp_path / "back").mkdir()
    with opened(tmp_path / "back", total=10) as monitor:
        for step in (1, 2, 3, 4, 5):
            monitor.step(record(step))
        monitor.rollback(3)
        monitor._last_line = -math.inf  # a line for the next step
        for step in (4, 5, 6):
            monitor.step(record(step))
    assert (tmp_path / "back/metrics.jsonl").read_bytes() == (
        tmp_path / "straight/metrics.jsonl"
    ).read_bytes()
    assert "step 4/10" in capfd.readouterr().err


def test_a_wall_clock_that_jumps_changes_neither_the_speed_nor_the_time_left(
    tmp_path, monkeypatch, capfd
):
    def lines(workdir):
        clock = itertools.count(0.0, 20.0)  # each look at it is 20 seconds later
        workdir.mkdir()
        with opened(workdir, Monitor(clock=lambda: next(clock))) as monitor:
            for step in range(1, 11):
                monitor.step(record(step))
        return capfd.readouterr().err

    calm, wall, jumps = lines(tmp_path / "calm"), time.time, itertools.cycle([86_400, 0, -86_400])
    monkeypatch.setattr(time, "time", lambda: wall() + next(jumps))
    assert lines(tmp_path / "jumps") == calm and "left" in calm


def test_numbers_keep_every_bit_of_a_float32(tmp_path):
    values = [
        struct.unpack("f", struct.pack("f", x))[0] for x in (1 / 3, 1e-38, 3.4e38, 16777217.0)
    ]
    with opened(tmp_path, total=9) as monitor:
        for step, value in enumerate(values, 1):
            monitor.step(record(step, loss=value))
    assert [struct.pack("f", r["loss"]) for r in read_metrics(tmp_path)] == [
        struct.pack("f", x) for x in values
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_still_json(tmp_path, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with opened(tmp_path, total=9) as monitor:
        monitor.step(record(1, loss=value, grad_norm=value, nonfinite=True, skipped=True, bad=1))
        monitor.evaluation(1, {"loss@512": value})
    step, evaluation = (
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert str(float(step["loss"])) == str(value) == str(float(evaluation["eval"]["loss@512"]))


def test_without_a_terminal_plain_lines_show_step_stage_loss_speed_and_time_left(tmp_path, capfd):
    run(tmp_path, range(1, 11), evaluations=(10,))
    text = capfd.readouterr().err
    first = text.splitlines()[0]
    for part in ("step 1/10", "512 shifted", "loss 4.0000", "12,346 tokens/s", "left"):
        assert part in first
    assert "step 10/10" in text and "loss@512" in text and "\x1b" not in text
    assert text.count("tokens/s") == 2  # not a line a step: these ten took no time


def test_what_is_said_is_not_markup(tmp_path, capfd):
    with opened(tmp_path, total=2) as monitor:
        monitor.say("loss [bold]3[/bold] [/nothing]")
    assert "[bold]3[/bold] [/nothing]" in capfd.readouterr().err


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    run(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("jax.process_index", lambda: 1)
    run(tmp_path, range(1, 5), evaluations=(4,))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
