"""What a process may have of its host's memory, and what jax may pin of it: a GPU's offloaded residuals wait there."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from jax._src import xla_bridge  # jax has no public way to ask whether it has started

from lljax.devices import GiB
from lljax.distributed import processes_here

LIMIT, PREALLOCATE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"
FIRST_REGION = 2 * 2 ** 20


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can have: what it holds, and what is left of the host and of its control groups.

    root: of the file system, for tests. Where there is no /proc, all memory of the machine.
    """
    try:
        status = root / "proc/self/status"
        return left_of_host(root) + 1024 * (_number(status, "RssAnon:") + _number(status, "RssShmem:"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_of_host(root: Path = Path("/")) -> int:
    """Bytes that are left of the host's memory and of this process' control groups. Raises OSError where there is no /proc."""
    return min([1024 * _number(root / "proc/meminfo", "MemAvailable:"), *_left_of_groups(root)])


def _left_of_groups(root: Path) -> Iterator[int]:
    """What is left of each control group that limits this process, version 1 or 2. A container may see its own group alone,
    at the top of what is mounted, whatever /proc says it is called."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes",
                                                         "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                try:
                    limit, used = (int((folder / name).read_text()) for name in names[:2])
                    yield max(limit - used + _number(folder / "memory.stat", names[2]), 0)
                except (OSError, ValueError):            # no such group here, or "max"
                    continue


def _number(path: Path, name: str) -> int:
    """The number after `name` at the beginning of a line; 0 where there is none."""
    match = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def usable(host: float) -> float:
    """Bytes of `host` bytes that residuals may take. The rest is for the process itself, arrays on their way and the system:
    beside 110 GiB of residuals on a host of 125 they took 12."""
    return max(host - max(host / 8, 4 * GiB), 0.0)


# ---------------------------------------------------------------- jax's pool of pinned memory
def set_pinned_limit() -> None:
    """Lets each GPU's pool of pinned memory grow to its share of what the host has, in place of jax's 64 GiB. Before jax
    starts, and after `lljax.distributed.start`; every process of a run must call it. A value that the user set stays, and so
    does the size of a pool that the user has jax allocate at once."""
    if LIMIT in os.environ or _preallocated() or xla_bridge.backends_are_initialized():
        return
    share = usable(host_memory()) / pools_here(processes_here())
    os.environ[LIMIT] = str(max(int(share / GiB), 2))    # arrays on their way to a GPU pass through such a pool too


def pinned_limit() -> int:
    """Bytes that the pool of one GPU may hold, as jax reads the environment (xla/pjrt/gpu/gpu_helpers.cc)."""
    try:
        return int(os.environ[LIMIT]) * GiB
    except (KeyError, ValueError):
        return (16 if _preallocated() else 64) * GiB


def _preallocated() -> bool:
    return os.environ.get(PREALLOCATE, "").lower() in ("1", "true")


def pools_here(processes: int, root: Path = Path("/")) -> int:
    """How many GPUs the `processes` of this host open, each of which has a pool; counted without starting jax.

    Each opens those that CUDA_VISIBLE_DEVICES lists, or all; under a launcher that jax knows, one of them.
    """
    there = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in (root / "dev").glob("nvidia*"))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    opened = there if listed is None else sum(bool(name.strip()) for name in listed.split(","))
    return max(min(processes * opened, max(there, processes)), 1)


def pooled(sizes: Iterable[int], limit: float) -> list[int]:
    """Bytes that a pool must hold for each of `sizes`, which are allocated and given back one after the other.

    The pool grows by regions that it never returns, each twice as large as the one before or large enough, and cut only by
    the limit: XLA's BFCAllocator::Extend. So a stage that needs 33 GiB takes 64, and one of 70 after it needs 134.
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
        region *= 1 if grown else 2
    return out
