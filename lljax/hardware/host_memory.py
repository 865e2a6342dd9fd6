"""Host memory: how much this process can use, and how much jax may pin for the offloaded residuals
of GPUs.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jax._src import xla_bridge  # jax has no public function that tells whether it has started

from lljax.hardware.chips import GiB

LIMIT, PREALLOCATE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"
FIRST_REGION = 2 * 2**20


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can use: already used by it, or still available.

    root: of the file system, for tests. Without /proc, all memory of the machine.
    """
    try:
        status = root / "proc/self/status"
        return available_memory(root) + 1024 * (
            _number(status, "RssAnon:") + _number(status, "RssShmem:")
        )
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that are still available to this process: MemAvailable of the host, or less if a cgroup
    has less left.

    Raises:
      OSError: there is no /proc.
    """
    return min(
        [1024 * _number(root / "proc/meminfo", "MemAvailable:"), *_available_in_cgroups(root)]
    )


def _available_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in every cgroup, version 1 or 2, that limits this process.

    A container may see its own cgroup only, at the top of the mounted tree, whatever path /proc
    gives for it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                try:
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    yield max(limit - used + _number(folder / "memory.stat", names[2]), 0)
                except (OSError, ValueError):  # no such cgroup here, or no limit ("max")
                    continue


def _number(path: Path, name: str) -> int:
    """The number after `name` at the start of a line; 0 if there is none."""
    match = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def usable(host: float) -> float:
    """Bytes of `host` bytes that offloaded residuals may use.

    An eighth, and at least 4 GiB, is reserved for the process itself, transfers and the system:
    beside a pool of 109 GiB, a run took 11 more on a host of 126 (H200).
    """
    return max(host - max(host / 8, 4 * GiB), 0.0)


# ---------------------------------------------------------------- jax's pools of pinned memory
def set_pinned_limit(processes: Callable[[], int]) -> None:
    """Sets the limit of every GPU's pool of pinned memory to its share of the host, instead of
    jax's 64 GiB.

    Call it in every process of a run, after `lljax.parallel.processes.start` and before jax starts;
    later it does nothing. A limit that the user has set is kept, and so is the size of a
    preallocated pool.

    processes: counts the run's processes on this host; called only if the limit is set here.
    """
    if LIMIT in os.environ or _preallocated() or xla_bridge.backends_are_initialized():
        return
    share = usable(host_memory()) / gpus_in_use(processes())
    # transfers to the device are staged in such a pool too
    os.environ[LIMIT] = str(max(int(share / GiB), 2))


def pinned_limit() -> int:
    """The limit of one GPU's pool in bytes, as jax reads it (xla/pjrt/gpu/gpu_helpers.cc)."""
    try:
        return int(os.environ[LIMIT]) * GiB
    except (KeyError, ValueError):
        return (16 if _preallocated() else 64) * GiB


def _preallocated() -> bool:
    return os.environ.get(PREALLOCATE, "").lower() in ("1", "true")


def gpus_in_use(processes: int, root: Path = Path("/")) -> int:
    """The number of GPUs that the run's `processes` on this host use, at least 1; counted without
    starting jax.

    A process uses the GPUs of CUDA_VISIBLE_DEVICES, or all; under a launcher that jax knows, one of
    them.
    """
    names = [path.name for path in (root / "dev").glob("nvidia*")]
    installed = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in names)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        per_process = installed
    else:
        per_process = sum(bool(name.strip()) for name in visible.split(","))
    return max(min(processes * per_process, max(installed, processes)), 1)


def pool_sizes(sizes: Iterable[int], limit: float) -> list[int]:
    """Bytes that a pool must hold for each of `sizes`, allocated and freed one after the other.

    The pool grows by regions, each at least twice as large as the one before and bounded by the
    limit only, and never frees one (XLA's BFCAllocator::Extend): 33 GiB take a region of 64, and 70
    GiB after them need 64 + 70.
    """
    region, regions, out = FIRST_REGION, [], []
    for size in sizes:
        if size <= max(regions, default=0):
            out.append(size)
            continue
        out.append(sum(regions) + size)
        grown = size > region
        while size > region:
            region *= 2
        regions.append(max(min(region, limit - sum(regions)), size))
        if not grown:
            region *= 2
    return out
