"""Runs of two processes on this machine: they end as one run, are stopped as one, and go on as any
other number.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lljax.errors import ConfigError
from lljax.parallel import processes as distributed
from lljax.report.records import read_metrics
from lljax.run.lock import locked
from lljax.run.restore import restore_run

ROOT = Path(__file__).parents[2]
LAUNCHER = re.compile(
    "^(JAX_(COORDINATOR|NUM_PROC|PROCESS_ID)|SLURM_|OMPI_|KUBERNETES_|JOB_COMPLETION|TPU_|"
    "MEGASCALE_)"
)


@pytest.fixture(scope="module")
def start(tiny, documents, tmp_path_factory):
    """start(workdir, processes, devices of each, *overrides) -> the processes; those that still run
    end with the test.
    """
    cache, started = tmp_path_factory.mktemp("compiled"), []

    def start(workdir, processes=2, devices=1, *overrides, command=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {
            name: value for name, value in os.environ.items() if not LAUNCHER.match(name)
        } | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = command or [
            sys.executable,
            "scripts/train.py",
            "--config=configs/quickstart.py",
            f"--workdir={workdir}",
            f"--config.model.path={tiny}",
            f"--config.data.train=('{documents}',)",
            "--config.training.rows=8",
            "--config.context.length=32",
            "--config.lora.targets=('q_proj',)",
            "--config.mesh.peer_timeout=10",
            *overrides,
        ]
        joining = (
            [
                {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
                for i in range(processes)
            ]
            if processes > 1
            else [{}]
        )
        run = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | joins,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for joins in joining
        ]
        started.extend(run)
        return run

    yield start
    for process in started:
        process.kill()


def ends(processes, timeout=300):
    """(exit code, last line) of each."""
    ended = [(process.communicate(timeout=timeout)[1], process.returncode) for process in processes]
    return [(code, (error.strip().splitlines() or [""])[-1]) for error, code in ended]


def wait_for_step(workdir, step, processes):
    while max((r["step"] for r in read_metrics(workdir)), default=0) < step:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.02)


def records(workdir):
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("seconds", "tokens_per_second")
        }
        for record in read_metrics(workdir)
    ]


def checksums(workdir):
    """Every leaf of the last checkpoint: trained weights, optimizer state, random key."""
    last = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    return last, json.loads(
        (workdir / "checkpoints" / str(last) / "note" / "metadata").read_text()
    )["leaves"]


AGREE = """
import os, sys, time
from pathlib import Path
from lljax.parallel import processes as distributed
folder, me = Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
distributed.LEAVE_SECONDS = 1
with distributed.session():
    distributed.start(10.0)
    assert distributed.from_all({"me": me}) == [{"me": "0"}, {"me": "1"}]
    assert distributed.any_of(me == "1") and not distributed.any_of(False)
    def work():
        (folder / me).touch()
        return sorted(path.name for path in folder.iterdir())
    assert distributed.first_then_others(work) == ["0", "1"][:int(me) + 1]
    if me == "1":
        sys.exit(3)
    while True:
        distributed.any_of(False)
"""


def test_two_processes_agree_take_turns_and_end_together(start, tmp_path):
    assert [
        code
        for code, _ in ends(
            start(tmp_path, 2, 1, command=[sys.executable, "-c", AGREE, str(tmp_path)])
        )
    ] == [69, 3]


@pytest.mark.slow
def test_two_processes_are_one_run_that_one_device_reads(start, tmp_path):
    run = start(
        tmp_path,
        2,
        1,
        "--config.context.schedule=((3,32,'full'),)",
        "--config.mesh.sequence=2",
        "--config.mesh.fsdp=1",
        "--config.data.valid_fraction=0.0",
    )
    assert [code for code, _ in ends(run)] == [0, 0]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert (
        json.loads((tmp_path / "run.json").read_text())["devices"] == 2
        and (tmp_path / "report.html").exists()
    )
    _, model, _ = restore_run(tmp_path)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(nnx.state(model))} == {1}


@pytest.mark.slow
def test_a_folder_in_which_another_run_goes_on_is_refused_in_every_process(start, tmp_path):
    with locked(tmp_path):
        run = ends(start(tmp_path, 2, 1, "--config.context.schedule=((3,32,'full'),)"))
    assert [code for code, _ in run] == [2, 2]
    assert all(
        f"process {os.getpid()} on {socket.gethostname()} trains there" in line for _, line in run
    )


OFTEN = (
    "--config.checkpoint.every_steps=5",
    "--config.training.eval_every=20",
    "--config.training.eval_rows=8",
    "--config.context.schedule=((60,32,'full'),)",
)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of two processes of two devices that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    assert [code for code, _ in ends(start(workdir, 2, 2, *OFTEN))] == [0, 0]
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_the_same_command_ends_as_if_nothing_had_happened(
    start, whole, tmp_path, killed
):
    run = start(tmp_path, 2, 2, *OFTEN)
    wait_for_step(tmp_path, 12, run)
    run[killed].kill()
    began = time.monotonic()
    code, line = ends(run, timeout=60)[1 - killed]
    assert code == 69 and time.monotonic() - began < 30
    assert (
        line.startswith(f"PeerLost: process {1 - killed} of 2 ends because another has ended")
        and "same command" in line
    )
    assert [code for code, _ in ends(start(tmp_path, 2, 2, *OFTEN))] == [0, 0]
    assert checksums(tmp_path) == checksums(whole)
    assert records(tmp_path) == records(whole)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step_and_one_process_goes_on_with_the_same_rows(
    start, whole, tmp_path
):
    run = start(tmp_path, 2, 2, *OFTEN)
    wait_for_step(tmp_path, 12, run)
    run[1].send_signal(signal.SIGTERM)
    assert len(set(ends(run))) == 1 and run[0].returncode == 75
    assert checksums(tmp_path)[0] == max(record["step"] for record in records(tmp_path)) < 60
    assert ends(start(tmp_path, 1, 1, *OFTEN))[0][0] == 0
    assert_same_rows(tmp_path, whole)


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_with_four_and_then_as_two_processes(start, whole, tmp_path):
    for step, processes, devices in ((8, 1, 8), (35, 1, 4)):
        run = start(tmp_path, processes, devices, *OFTEN)
        wait_for_step(tmp_path, step, run)
        run[0].terminate()
        assert ends(run)[0][0] == 75
    assert [code for code, _ in ends(start(tmp_path, 2, 1, *OFTEN))] == [0, 0]
    assert_same_rows(tmp_path, whole)


def assert_same_rows(workdir, whole):
    """The counts of predicted tokens are equal, and the losses as far as sums in another order can
    be.
    """
    assert len(records(workdir)) == len(records(whole))
    for one, other in zip(records(workdir), records(whole), strict=True):
        assert one.get("tokens") == other.get("tokens")
        np.testing.assert_allclose(one.get("loss", 0), other.get("loss", 0), rtol=1e-3)


# ---------------------------------------------------------------- how processes find each other
@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher in place of any that are set."""
    for name in filter(LAUNCHER.match, list(os.environ)):
        monkeypatch.delenv(name)
    return lambda **variables: [
        monkeypatch.setenv(name, value) for name, value in variables.items()
    ]


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_NTASKS": "4", "JAX_NUM_PROCESSES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_alone_nothing_is_started(environment, variables):
    environment(**variables)
    distributed.start(100.0)
    assert not jax.distributed.is_initialized()


def test_a_launcher_that_jax_knows_is_counted(environment):
    environment(**SLURM, SLURM_NTASKS="4")
    assert distributed._detected() == 4


@pytest.mark.parametrize(
    "variables,shown",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2 do not suffice"),
        (
            {
                "JAX_NUM_PROCESSES": "2",
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID=2 do not",
        ),
        (
            {
                "JAX_NUM_PROCESSES": "2",
                "JAX_COORDINATOR_ADDRESS": "localhost",
                "JAX_PROCESS_ID": "0",
            },
            "=HOST:PORT",
        ),
        (
            SLURM | {"SLURM_NTASKS": "four"},
            "SlurmCluster and cannot read it.*JAX_NUM_PROCESSES=1 to run alone",
        ),
    ],
)
def test_half_an_environment_is_refused_in_one_line(environment, variables, shown):
    environment(**variables)
    with pytest.raises(ConfigError, match=shown) as refused:
        distributed.start(100.0)
    assert "\n" not in str(refused.value)


def test_alone_every_agreement_is_with_oneself():
    assert distributed.is_first() and distributed.from_all({"a": 1}) == [{"a": 1}]
    assert distributed.any_of(True) and not distributed.any_of(False)
    assert distributed.first_then_others(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError), distributed.session():
        raise ZeroDivisionError


ENDS = """
import sys, threading, time
from lljax.parallel.processes import to_the_end
# like the threads of Orbax after a save that failed
threading.Thread(target=time.sleep, args=[60]).start()
with to_the_end():
    print("done")
    {end}
"""


@pytest.mark.parametrize(
    "end,code,said", [("sys.exit(75)", 75, ""), ("1 / 0", 1, "ZeroDivisionError: division by zero")]
)
def test_a_script_that_is_done_ends_whatever_its_threads_wait_for(end, code, said):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(end=end)],
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (code, "done\n")
    assert (done.stderr.strip().splitlines() or [""])[-1] == said
