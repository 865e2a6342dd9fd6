"""What the steps of a run take of a device: read from the compiled programs, shown as a table, refused where it cannot fit."""

import contextlib
import dataclasses
import io
import math
import os
import re
from collections.abc import Callable

import jax
from rich.console import Console
from rich.table import Table

from lljax.devices import GiB
from lljax.distributed import from_all
from lljax.errors import ConfigError, OutOfMemory
from lljax.models.decoder import share_residuals


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device that the step of a stage takes.

    peak: arguments + outputs - what they share + temporaries. host: bytes of the host's memory. compiled: False where the
    compiler refused the step for its memory; the peak is then what it says.
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

    def fits(self, memory: float, host: float) -> bool:
        return self.compiled and self.peak <= memory and self.host <= host


def compile_step(label: str, parts, batch: dict, pattern, layout) -> tuple[Need, jax.stages.Compiled | None]:
    """Compiles `parts.step` (of lljax.training.step.take_apart) for one stage; nothing needs to have values. The program is
    called with (state, frozen, batch); None where the compiler refuses it."""
    sizes = {"label": label, "context_parallel": layout.context_parallel if layout else "none", "base": bytes_of(parts.frozen),
             "trainable": bytes_of(parts.state.trainable), "optimizer": bytes_of(parts.state.optimizer)}
    try:
        program = parts.step.lower(parts.state, parts.frozen, batch, pattern, layout).compile()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler refuses what does not fit, and says by how much.
        used = re.search(r"Used ([\d.]+)([GM]) of|([\d.]+)([GM])\)? exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        size, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
        peak = int(float(size) * (GiB if unit == "G" else 2 ** 20))
        rest = peak - sizes["base"] - sizes["trainable"] - sizes["optimizer"]
        return Need(**sizes, temporary=max(rest, 0), peak=peak, host=0, compiled=False), None
    m = program.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Need(**sizes, temporary=m.temp_size_in_bytes, peak=peak, host=m.host_temp_size_in_bytes, compiled=True), program


def bytes_of(tree) -> int:
    """Of one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def capacity(mesh) -> tuple[float, float]:
    """Bytes of a device and of the host's memory that goes with it; the least of all processes, which must all call this."""
    here = mesh.local_devices
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(here)
    memory = (here[0].memory_stats() or {}).get("bytes_limit", host)
    return tuple(min(each) for each in zip(*from_all([memory, host])))


def table(needs: list[Need], memory: float, host: float, title: str) -> Table:
    """Memory by stage, GiB of a device."""
    out = Table(title=f"{title}; GiB a device")
    for column in ("stage", "parallel", "base", "trained", "optimizer", "temporary", "peak", "host", "of the device", "fits"):
        out.add_column(column, justify="left" if column in ("stage", "parallel", "fits") else "right")
    for n in needs:
        out.add_row(n.label, n.context_parallel, *(f"{size / GiB:.2f}" for size in (
            n.base, n.trainable, n.optimizer, n.temporary, n.peak, n.host)), f"{n.peak / memory:.0%}",
            "yes" if n.fits(memory, host) else "NO")
    return out


def as_text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue().rstrip()


def check(needs: list[Need], memory: float, host: float, config, layers) -> None:
    """Raises ConfigError where a stage cannot fit; a compiled one may be tried with memory.refuse=False."""
    for n in needs:
        if n.fits(memory, host) or (n.compiled and not config.memory.refuse):
            continue
        what, need, has = ("host", n.host, host) if n.peak <= memory and n.compiled else ("device", n.peak, memory)
        anyway = "; memory.refuse=False tries it as it is" if n.compiled else ""
        raise ConfigError(f"stage {n.label} needs {need / GiB:.2f} GiB of a {what}'s memory and there are {has / GiB:.2f}: "
                          f"{advice(config, layers)}{anyway}")


def advice(config, layers) -> str:
    """What makes room for a step."""
    listed = "; ".join(words(way) for way in ways(config, layers)[:3])
    return f"set {listed}, or spread it over more devices" if listed else "spread it over more devices"


@contextlib.contextmanager
def in_memory(what: str, way_out: str, last_checkpoint: Callable[[], int | None]):
    """A context for `what`, in which a device that has no memory left is one line.

    Raises:
      OutOfMemory: with the way out, and what the run can go on from.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        step, reason = last_checkpoint(), str(error).strip().splitlines()[0][:120]
        saved = "no checkpoint is there yet" if step is None else f"the last checkpoint is of step {step}"
        raise OutOfMemory(f"{what}: a device is out of memory ({reason}): {way_out}; {saved}, and the settings of memory and "
                          "mesh may change when a run goes on") from error


def ways(config, layers) -> list[dict]:
    """Changes that make room for a model of `layers` (`DecoderSpec.layers`), each alone, those first that cost least time."""
    m = config.memory
    out = [{"memory.remat": "full"}] if m.remat != "full" else []
    if not m.tile or m.tile > 4096:
        out.append({"memory.tile": 4096})
    if not m.offload:
        out.append({"memory.offload": True} | ({"memory.remat": "full"} if m.remat == "none" else {}))
    if m.remat != "none":
        out += [{"memory.layers_per_residual": each} for each in (2, 4)
                if each > m.layers_per_residual and share_residuals(layers, each)]
    return out


def words(changes: dict) -> str:
    return " ".join(f"{field}={value!r}" for field, value in changes.items())
