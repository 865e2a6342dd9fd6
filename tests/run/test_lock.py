"""A second process is refused in one line, a killed one leaves nothing behind, and readers do not
notice.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys

import pytest

from lljax.errors import ConfigError
from lljax.run import lock, loop
from lljax.run.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from lljax.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name_before_it_writes_and_after_kill_9_it_starts(
    run_config, holder, tmp_path
):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as refused:
        loop.train(run_config, tmp_path)
    line = str(refused.value)
    for part in (
        f"--workdir={tmp_path}",
        f"process {holder.pid} on {socket.gethostname()}",
        "stop it",
        "another folder",
    ):
        assert part in line
    assert (
        "\n" not in line and refused.value.exit_code == 2 and sorted(tmp_path.iterdir()) == before
    )
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_it_is_free_again_after_a_run_that_failed_and_excludes_within_a_process_too(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "no locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(ConfigError, match="nothing can be written there"),
        locked(tmp_path / "nowhere"),
    ):
        pass


def test_the_first_process_locks_and_its_refusal_reaches_all(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with locked(tmp_path):
        assert not (tmp_path / "lock").exists()
    monkeypatch.setattr(
        lock,
        "from_all",
        lambda value: ["process 7 on far trains there", json.loads(json.dumps(value))],
    )
    with pytest.raises(ConfigError, match="process 7 on far"), locked(tmp_path):
        pass


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_in_its_place_is_refused_and_what_it_points_to_stays(tmp_path, make):
    precious = tmp_path / "precious"
    precious.write_text("mine\n")
    make(precious, tmp_path / "lock")
    with pytest.raises(ConfigError, match="lock is .*: delete that"), locked(tmp_path):
        pass
    assert precious.read_text() == "mine\n"


def test_deleted_while_a_run_goes_on_it_is_made_again(tmp_path):
    with locked(tmp_path) as lock:
        lock.check()
        (tmp_path / "lock").unlink()
        lock.check()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass


@pytest.mark.parametrize("replace", ["another run", "a link"])
def test_a_run_whose_lock_another_has_taken_leaves(tmp_path, replace):
    with locked(tmp_path) as lock:
        (tmp_path / "lock").unlink()
        with locked(tmp_path) if replace == "another run" else contextlib.nullcontext():
            if replace == "a link":
                (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
            with pytest.raises(
                ConfigError, match="deleted or replaced while this run went on.*saves nothing more"
            ):
                lock.check()
    assert not (tmp_path / "elsewhere").exists()
