"""The memory that steps and evaluations need: read from the compiled programs, shown as a table,
refused if it is more than there is.
"""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.table
from jax.sharding import Mesh
from rich.console import Console

from lljax.config import Config
from lljax.errors import ConfigError, OutOfMemory
from lljax.hardware.chips import GiB
from lljax.hardware.host_memory import LIMIT, host_memory, pinned_limit, pool_sizes, usable
from lljax.models.decoder import can_share_residuals
from lljax.models.spec import LayerSpec
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.processes import from_all, processes_on_host
from lljax.training.curriculum import Stage
from lljax.training.prepare import Prepared, Program


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device that a step, an evaluation or a part of a rollout takes.

    base: frozen weights.
    peak: arguments + outputs - memory that both share + temporaries.
    host: bytes of the host's memory.
    compiled: False if the compiler refused the program for its memory; it then reported the peak.
    writes: see `Program.writes`.
    """

    label: str
    context_parallel: str
    base: int
    trainable: int
    optimizer: int
    temporary: int
    peak: int
    host: int
    compiled: bool
    writes: bool = False

    def fits(self, memory: float, host: float) -> bool:
        return self.compiled and self.peak <= memory and self.host <= host


def evaluation_lengths(config: Config, stages: Sequence[Stage]) -> list[int]:
    """The lengths of the held-out rows that a run evaluates on in `stages`, in order: the length of
    every stage with a step that training.eval_every divides, and of the last stage, at the end.
    Empty without held-out documents, or if the objective evaluates otherwise.
    """
    evaluates = OBJECTIVES[config.objective.name].evaluate is not None
    held_out = config.data.valid or config.data.valid_fraction
    if not (evaluates and held_out and stages):
        return []
    every = config.training.eval_every
    due = [s.length for s in stages if every and s.stop // every > s.start // every]
    return list(dict.fromkeys([*due, stages[-1].length]))


def needs_of(program: Program, prepared: Prepared) -> list[Need]:
    """The need of `program`, and of its scorer if it has one."""
    scorer = [] if program.scorer is None else [need_of(program.scorer, prepared)]
    return [need_of(program, prepared), *scorer]


def need_of(program: Program, prepared: Prepared) -> Need:
    """Compiles `program` and reads its need. It includes what stays on the device unused: the
    optimizer during an evaluation or a rollout, and the leaves of the reference if it is kept.
    """
    state, layout = prepared.state, program.layout
    sizes = {
        "label": program.label,
        "writes": program.writes,
        "context_parallel": layout.context_parallel if layout else "none",
        "base": bytes_of(prepared.frozen),
        "trainable": bytes_of(state.trainable),
        "optimizer": bytes_of(state.optimizer),
    }
    idle = 0 if program.trains else sizes["optimizer"]
    idle += sizes["trainable"] if prepared.keeps_reference else 0
    try:
        memory: Any = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        peak = _refused(error) + idle
        rest = peak - sizes["base"] - sizes["trainable"] - sizes["optimizer"]
        return Need(**sizes, temporary=max(rest, 0), peak=peak, host=0, compiled=False)
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + idle
    )
    return Need(
        **sizes,
        temporary=memory.temp_size_in_bytes,
        peak=peak,
        host=memory.host_temp_size_in_bytes,
        compiled=True,
    )


def _refused(error: Exception) -> int:
    """The bytes that a program needs by the message of the TPU compiler, which refuses a program
    that does not fit; any other error is raised again.
    """
    used = re.search(r"Used ([\d.]+)([GM]) of|([\d.]+)([GM])\)? exceeds", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not used:
        raise error
    size, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
    return int(float(size) * (GiB if unit == "G" else 2**20))


def bytes_of(tree: Any) -> int:
    """Bytes of a pytree of arrays on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def capacity(mesh: Mesh) -> tuple[float, float]:
    """Bytes of a device's memory, and of host memory for the residuals of one device (on a GPU its
    pool of pinned memory, see lljax.hardware.host_memory): the minimum over all processes, all of
    which must call this.
    """
    here = mesh.local_devices
    share = host_memory() / (processes_on_host() * len(here))
    memory = (here[0].memory_stats() or {}).get("bytes_limit", share)
    host = {"gpu": min(share, pinned_limit()), "cpu": share}.get(here[0].platform, usable(share))
    memories, hosts = zip(*from_all([memory, host]), strict=True)
    return min(memories), min(hosts)


def with_pool(needs: list[Need], platform: str, host: float) -> list[Need]:
    """The `needs` of programs that run one after the other, with the size of a GPU's pool during
    each program as `host`: the pool keeps the regions that earlier programs used.
    """
    if platform not in ("gpu", "cuda"):
        return needs
    sizes = pool_sizes([n.host for n in needs], host)
    return [dataclasses.replace(n, host=size) for n, size in zip(needs, sizes, strict=True)]


def table(needs: list[Need], memory: float, host: float, title: str) -> rich.table.Table:
    """Memory by program, in GiB of a device.

    memory, host: bytes of a device and of the host that a program may use.
    """
    out = rich.table.Table(title=f"{title}; GiB per device")
    for column in ("stage", "parallel"):
        out.add_column(column)
    for column in ("base", "trained", "optimizer", "temporary", "peak", "host", "of the device"):
        out.add_column(column, justify="right")
    out.add_column("fits")
    for n in needs:
        sizes = (n.base, n.trainable, n.optimizer, n.temporary, n.peak, n.host)
        out.add_row(
            n.label,
            n.context_parallel,
            *(f"{size / GiB:.2f}" for size in sizes),
            f"{n.peak / memory:.0%}",
            "yes" if n.fits(memory, host) else "NO",
        )
    return out


def as_text(table: rich.table.Table) -> str:
    """A table as plain text of at most 140 columns."""
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue().rstrip()


def check(
    needs: list[Need], memory: float, host: float, config: Config, layers: tuple[LayerSpec, ...]
) -> None:
    """Refuses programs that cannot fit; a compiled one may be tried with memory.refuse=False.

    layers: the layers of the spec, for the advice.

    Raises:
      ConfigError: a program does not fit.
    """
    for n in needs:
        if n.fits(memory, host) or (n.compiled and not config.memory.refuse):
            continue
        of_host = n.compiled and n.peak <= memory
        if of_host:
            shortage = (
                f"{n.host / GiB:.2f} GiB of host memory for residuals and a device can have "
                f"{host / GiB:.2f} (on a GPU no more than {LIMIT})"
            )
        else:
            shortage = (
                f"{n.peak / GiB:.2f} GiB of a device's memory and there are {memory / GiB:.2f}"
            )
        anyway = "; memory.refuse=False tries it anyway" if n.compiled else ""
        raise ConfigError(
            f"this run does not fit: {n.label} needs {shortage}: "
            f"{advice(config, layers, of_host, n.writes)}{anyway}"
        )


def advice(
    config: Config, layers: tuple[LayerSpec, ...], of_host: bool = False, writes: bool = False
) -> str:
    """Settings that make room for a step, as the end of a message. of_host: room on the host.
    writes: room for a rollout.
    """
    found = rollout_ways(config) if writes else ways(config, layers, of_host)
    listed = "; ".join(words(way) for way in found[:3])
    return (
        f"set {listed}, or spread it over more devices" if listed else "spread it over more devices"
    )


@contextlib.contextmanager
def explain_out_of_memory(
    action: str, way_out: str, last_checkpoint: Callable[[], int | None]
) -> Iterator[None]:
    """A context that reports a full device, or full pinned memory of the host, as a one-line error.

    action: the action that the message names. last_checkpoint: returns its step, None without one.

    Raises:
      OutOfMemory: with the way out and the last checkpoint.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        step, reason = last_checkpoint(), str(error).strip().splitlines()[0][:120]
        saved = (
            "no checkpoint is there yet"
            if step is None
            else f"the last checkpoint is of step {step}"
        )
        where = "a device is out of memory"
        if "host memory" in reason:  # the pool of pinned memory
            where = "the host is out of memory for residuals"
            way_out = (
                f"raise {LIMIT} if the host has more, or set memory.layers_per_residual or "
                "memory.offload=False"
            )
        raise OutOfMemory(
            f"{action}: {where} ({reason}): {way_out}; {saved}, and the settings of memory and "
            "mesh may change when a run goes on"
        ) from error


def ways(
    config: Config, layers: tuple[LayerSpec, ...], of_host: bool = False
) -> list[dict[str, Any]]:
    """Changes that each make room for a model of `layers` (`DecoderSpec.layers`) on the device, or
    on its host; the cheapest in time first.
    """
    m = config.memory
    fewer: list[dict[str, Any]] = [
        {"memory.layers_per_residual": n}
        for n in (2, 4)
        if m.remat != "none" and n > m.layers_per_residual and can_share_residuals(layers, n)
    ]
    if of_host:
        return [*fewer, {"memory.offload": False}]
    out: list[dict[str, Any]] = [{"memory.remat": "full"}] if m.remat != "full" else []
    if not m.tile or m.tile > 4096:
        out.append({"memory.tile": 4096})
    if not m.offload:
        needed = {"memory.remat": "full"} if m.remat == "none" else {}
        out.append({"memory.offload": True} | needed)
    return out + fewer


def rollout_ways(config: Config) -> list[dict[str, Any]]:
    """Changes that make room on the device while answers are written; none if nothing is."""
    samples = OBJECTIVES[config.objective.name].samples
    return [{"rollout.cache": "int8"}] if samples and config.rollout.cache != "int8" else []


def words(changes: dict) -> str:
    """Settings as a user writes them."""
    return " ".join(f"{field}={value!r}" for field, value in changes.items())
