"""The host memory that a process may use, from the files of an invented machine, and the growth of
jax's pool.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lljax.hardware.chips import GiB
from lljax.hardware.compiler_flags import take_gpu_memory
from lljax.hardware.host_memory import (
    LIMIT,
    PREALLOCATE,
    gpus_in_use,
    host_memory,
    pinned_limit,
    pool_sizes,
    usable,
)
from lljax.parallel.processes import processes_on_host
from lljax.planning import fit

KB = GiB // 1024


@pytest.fixture
def machine(tmp_path):
    """Writes files of a machine that has 100 GiB left, in a process that holds 3."""

    def write(files):
        files = {
            "proc/meminfo": (
                f"MemTotal: {125 * KB} kB\nMemFree: {2 * KB} kB\nMemAvailable: {100 * KB} kB\n"
            ),
            "proc/self/status": (
                f"Name:\tpython\nVmRSS: {9 * KB} kB\nRssAnon:\t {2 * KB} kB\nRssShmem:\t{KB} kB\n"
            ),
        } | files
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return write


def group(folder, limit, used, cache=0, version=2):
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": f"cache 77\n{names[2]} {cache}\n",
    }


V2 = {"proc/self/cgroup": "0::/pod/run\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n"}


@pytest.mark.parametrize(
    "files,left",
    [
        ({}, 100),
        (V2 | group("sys/fs/cgroup/pod/run", "max", 5 * GiB), 100),
        (V2 | group("sys/fs/cgroup/pod/run", 64 * GiB, 5 * GiB, cache=4 * GiB), 63),
        (
            V2
            | group("sys/fs/cgroup/pod/run", "max", GiB)
            | group("sys/fs/cgroup/pod", 32 * GiB, 12 * GiB),
            20,
        ),
        # a container sees its own group at the top
        (V2 | group("sys/fs/cgroup", 48 * GiB, 8 * GiB), 40),
        (V2 | group("sys/fs/cgroup/pod", 8 * GiB, 9 * GiB), 0),
        (V1 | group("sys/fs/cgroup/memory/docker/abc", 40 * GiB, 10 * GiB, GiB, version=1), 31),
        (V1 | group("sys/fs/cgroup/memory", 16 * GiB, GiB, version=1), 15),
        (V1 | group("sys/fs/cgroup/memory", 9223372036854771712, GiB, version=1), 100),
        ({"proc/self/cgroup": "0::/../../elsewhere\n"}, 100),
    ],
)
def test_a_process_can_use_the_memory_it_has_and_the_memory_left(machine, files, left):
    assert host_memory(machine(files)) == (left + 3) * GiB


def test_a_machine_without_proc_has_all_its_memory(tmp_path):
    assert host_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "nodes,listed,processes,pools",
    [
        (0, None, 1, 1),
        (1, None, 1, 1),
        (8, None, 1, 8),
        (8, "3", 1, 1),
        (8, "0,1,2,3", 2, 8),
        (8, None, 8, 8),
        (8, "5", 8, 8),
        (1, "0", 8, 8),
        (8, "", 1, 1),
    ],
)
def test_every_gpu_of_the_run_on_a_host_has_a_pool(
    tmp_path, monkeypatch, nodes, listed, processes, pools
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    (tmp_path / "dev").mkdir()
    for name in [f"nvidia{n}" for n in range(nodes)] + ["nvidiactl", "nvidia-uvm"]:
        (tmp_path / "dev" / name).touch()
    assert gpus_in_use(processes, tmp_path) == pools


def test_the_pool_keeps_its_regions_and_doubles_them():
    assert pool_sizes([96], 1e9) == [96]
    assert pool_sizes([33 * GiB, 70 * GiB], 107 * GiB) == [33 * GiB, (64 + 70) * GiB]
    assert pool_sizes([70 * GiB, 33 * GiB, 0], 107 * GiB) == [70 * GiB, 33 * GiB, 0]
    # 128, cut
    assert pool_sizes([70 * GiB, 110 * GiB, 125 * GiB], 120 * GiB) == [
        70 * GiB,
        110 * GiB,
        (120 + 125) * GiB,
    ]
    assert pool_sizes([2 * 2**20, 3 * 2**20], GiB) == [2 * 2**20, 5 * 2**20]


@pytest.mark.parametrize(
    "environment,limit",
    [
        ({}, 64),
        ({LIMIT: "107"}, 107),
        ({LIMIT: "a lot"}, 64),
        ({PREALLOCATE: "true"}, 16),
        ({PREALLOCATE: "1", LIMIT: "8"}, 8),
    ],
)
def test_the_limit_is_read_as_jax_reads_it(monkeypatch, environment, limit):
    for name in (LIMIT, PREALLOCATE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pinned_limit() == limit * GiB


def test_a_gpu_has_its_share_of_the_host_or_what_its_pool_may_hold(monkeypatch):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 77 * GiB})
    monkeypatch.setattr(fit, "host_memory", lambda: 100 * GiB)
    monkeypatch.setenv(LIMIT, "40")
    assert fit.capacity(SimpleNamespace(local_devices=[device])) == (77 * GiB, 40 * GiB)
    assert fit.capacity(SimpleNamespace(local_devices=[device] * 4)) == (77 * GiB, 25 * GiB)


def test_it_is_too_late_once_jax_has_started(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    take_gpu_memory(processes_on_host)
    assert LIMIT not in os.environ


def test_training_sets_the_limit_before_jax_starts_unless_the_user_set_it(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from lljax.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        "    c.model.path, c.data.train = 'a model', ('documents.jsonl',)\n    return c\n"
    )
    code = f"""if True:
        import os
        from jax._src import xla_bridge
        from lljax.cli import train
        from lljax.hardware.compiler_flags import take_gpu_memory
        from lljax.parallel.processes import processes_on_host
        from lljax.run import loop

        def show(*_, **__):
            started = xla_bridge.backends_are_initialized()
            print("limit", os.environ.get("{LIMIT}"), started, flush=True)
        for given in ({{"{LIMIT}": "5"}}, {{"{PREALLOCATE}": "true"}}, {{}}):
            for name in ("{LIMIT}", "{PREALLOCATE}"):
                os.environ.pop(name, None)
            os.environ.update(given)
            if given:
                take_gpu_memory(processes_on_host)
                show()
        loop.train = show
        train.main(["--config={config}", "--workdir=."])
    """
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    *rest, computed = [line.split()[1:] for line in out.splitlines() if line.startswith("limit ")]
    assert (
        2 <= int(computed[0]) <= max(usable(host_memory()) * 1.2 / GiB, 2)
        and computed[1] == "False"
    )
    assert rest == [["5", "False"], ["None", "False"]]
