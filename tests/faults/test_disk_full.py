"""A full disk costs the file that is written, with one line, and nothing that was there."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from faults.runs import STEPS

from lljax.errors import exit_cleanly
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.run.restore import restore_run

pytestmark = pytest.mark.faults
HALF = STEPS // 2
FREE = [0, 16, 64, 96, 128, 256]  # KiB, less than the run has yet to write


class Disk:
    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def with_room_for(self, size: int):
        """Of KiB. The rest is filled."""
        free = shutil.disk_usage(self.folder).free
        with open(self.folder / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(1, free - 1024 * size))
        try:
            yield
        finally:
            (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    """A real file system of its own, of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "lljax-faults", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
    whole, new_run, disk, tally
):
    row = tally("disk full while a run goes on", len(FREE))
    for size in FREE:
        run = new_run(f"disk/run-{size}")
        shutil.copytree(whole.run.workdir, run.workdir)
        for step in range(HALF + 1, STEPS + 1):
            shutil.rmtree(run.workdir / "checkpoints" / str(step), ignore_errors=True)
        run.log = disk.folder.with_name(f"{size}.log")
        with disk.with_room_for(size):
            process = run.fork()
            process.join(300)
            hangs, line, left = process.is_alive(), run.last_line(), run.newest()
            process.kill()
            process.join()
        said = process.exitcode == 1 and "Error: " in line
        sound = left == whole.states[left.step] and left.step >= HALF
        run.finish()
        row.case(
            not hangs
            and said
            and sound
            and run.newest() == whole.states[STEPS]
            and run.records() == whole.records,
            (size, hangs, process.exitcode, left.step, line),
        )
        shutil.rmtree(run.workdir)
    row.done()


@pytest.mark.parametrize("export", [export_peft, export_merged, export_split])
def test_an_export_on_a_full_disk_leaves_nothing_and_succeeds_when_there_is_room(
    whole, disk, tally, capsys, export
):
    row = tally("disk full while an export is written", len(FREE))
    _, model, base = restore_run(whole.run.workdir)
    export(model, base, disk.folder / "whole")
    size = sum(path.stat().st_size for path in (disk.folder / "whole").rglob("*")) // 1024
    for share in range(len(FREE)):
        out = disk.folder / f"out-{share}"
        with (
            disk.with_room_for(size * share // len(FREE)),
            pytest.raises(SystemExit) as left,
            exit_cleanly(),
        ):
            export(model, base, out)
        said = capsys.readouterr().err
        nothing = [path.name for path in disk.folder.iterdir()] == ["whole"]
        export(model, base, out)
        same = all(
            (out / path.relative_to(disk.folder / "whole")).read_bytes()
            == path.read_bytes().replace(b"/whole/", b"/" + out.name.encode() + b"/")
            for path in (disk.folder / "whole").rglob("*")
            if path.is_file()
        )
        shutil.rmtree(out)
        row.case(
            left.value.code == 1
            and said.count("\n") == 1
            and "Error: " in said
            and nothing
            and same,
            (export.__name__, share, left.value.code, said, nothing, same),
        )
    row.done()
