"""Mishaps around a run: its terminal closes, nobody reads its log, its disk fails for a second,
others touch its files.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import ONE_DEVICE, ROOT, STEPS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="uses setpriv"),
]
LONG = "--config.context.schedule=((2000,32,'shifted'),(4000,64,'full'))"
NO_ROOT = [
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
]
LEAVES_IN = 10


@pytest.fixture
def begin(new_run):
    """begin(name, ...) -> (the run, its process), once it has come to a step; the process is gone
    after the test.
    """
    processes = []

    def start(name, *overrides, step=6, stderr=None, before=()):
        run, since = new_run(name, *overrides), time.time()
        run.arguments = [
            LONG if "context.schedule" in argument else argument for argument in run.arguments
        ]
        with open(run.log, "a") as log:
            processes.append(
                subprocess.Popen(
                    [*before, sys.executable, "scripts/train.py", *run.arguments],
                    cwd=ROOT,
                    stdout=log,
                    stderr=stderr or log,
                    env=os.environ | ONE_DEVICE | {"PYTHONPATH": str(ROOT)},
                )
            )
        run.wait_for_step(step, processes[-1], since)
        assert processes[-1].poll() is None, run.last_line()
        return run, processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def leaves(run, process, number) -> bool:
    """Whether the run, after this signal, saves every recorded step and ends in time with 75."""
    process.send_signal(number)
    try:
        return process.wait(LEAVES_IN) == 75 and max(run.steps()) == run.last_record()
    except subprocess.TimeoutExpired:
        return False


def test_a_terminal_that_closes_is_a_request_to_stop(begin, tally):
    row = tally("terminal closed (SIGHUP), log not read", 2)
    run, process = begin("closed")
    row.case(leaves(run, process, signal.SIGHUP), run.last_line())
    read, write = os.pipe()
    run, process = begin("unread", stderr=write)
    os.close(write)
    os.close(read)
    at = run.last_record()
    run.wait_for_step(at + 50, process, 0)
    row.case(
        run.last_record() >= at + 50 and leaves(run, process, signal.SIGHUP), run.last_record()
    )
    row.done()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_save_that_failed_it_leaves_as_soon_as_ever(begin, tally, number):
    row = tally("stopped after a save that failed", 1)
    run, process = begin("failed", before=NO_ROOT if os.getuid() == 0 else ())
    folder = run.workdir / "checkpoints"
    os.chmod(folder, 0o500)
    time.sleep(1)
    os.chmod(folder, 0o755)
    run.wait_for_step(run.last_record() + 20, process, 0)
    row.case(
        "could not be written" in run.log.read_text() and leaves(run, process, number),
        run.last_line(),
    )
    row.done()


def test_a_lock_that_is_deleted_lets_no_second_run_in(begin, tally):
    row = tally("run/lock deleted or replaced", 2)
    run, process = begin("deleted")
    (run.workdir / "lock").unlink()
    second = run.start()
    row.case(
        second.wait(60) == 2 and process.poll() is None and "trains there" in run.last_line(),
        run.last_line(),
    )
    (run.workdir / "lock").unlink()
    (run.workdir / "lock").symlink_to(run.workdir / "elsewhere")
    row.case(process.wait(60) == 2 and not (run.workdir / "elsewhere").exists(), run.last_line())
    row.done()


def test_a_damaged_record_and_a_report_beside_it_do_not_end_a_run(whole, new_run, tally):
    row = tally("metrics.jsonl damaged, report.html written by two", 3)
    for number, damage in enumerate(
        [lambda line: bytes([line[0], line[1] ^ 0x80]) + line[2:], lambda line: b"5"]
    ):
        run = new_run(f"damaged-{number}")
        shutil.copytree(whole.run.workdir, run.workdir)
        for step in range(STEPS // 2 + 1, STEPS + 1):
            shutil.rmtree(run.workdir / "checkpoints" / str(step), ignore_errors=True)
        lines = (run.workdir / "metrics.jsonl").read_bytes().splitlines()
        lines[4] = damage(lines[4])
        (run.workdir / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        run.finish()
        rest = [record for i, record in enumerate(whole.records) if i != 4]
        row.case(
            "1 damaged lines" in run.log.read_text() and run.records() == rest, run.last_line()
        )
    run = new_run("reports", "--config.training.report_every=1")
    process = run.fork()
    while process.is_alive():
        subprocess.run(
            [sys.executable, "scripts/report.py", f"--workdir={run.workdir}"],
            cwd=ROOT,
            capture_output=True,
        )
    process.join()
    row.case(process.exitcode == 0 and run.newest() == whole.states[STEPS], run.last_line())
    row.done()


def test_a_base_that_was_replaced_is_refused_by_train_export_and_generate(
    begin, tiny, tmp_path, tally
):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    run, process = begin("swapped", f"--config.model.path={base}")
    assert leaves(run, process, signal.SIGTERM)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    commands = [
        ["train.py", *run.arguments],
        ["export.py", f"--workdir={run.workdir}"],
        ["generate.py", f"--workdir={run.workdir}", "--prompt=a", "--tokens=2"],
    ]
    row = tally("weights of the base replaced", len(commands))
    for command in commands:
        done = subprocess.run(
            [sys.executable, f"scripts/{command[0]}", *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | ONE_DEVICE | {"PYTHONPATH": str(ROOT)},
        )
        row.case(
            done.returncode == 2 and "other weights" in done.stderr.splitlines()[-1],
            done.stderr[-300:],
        )
    row.done()


def test_readers_of_a_run_that_keeps_one_checkpoint_find_it(begin, tally):
    row = tally("checkpoint read while the run deletes it", 20)
    run, _ = begin("read", "--config.checkpoint.keep=1", "--config.checkpoint.every_steps=3")
    last = 0
    for _ in itertools.repeat(None, row.cases):
        left = run.newest()
        row.case(left.step >= last and json.dumps(left.loader), left.step)
        last = left.step
    row.done()
