"""What a run needs, before any weight is read: every stage's real step compiled for the real target.

Memory comes from the compiler, but for the workspace of cuDNN, which only a device would tell it; arithmetic is counted by
`lljax.training.flops`; traffic is read from the program.
"""

import dataclasses
import time
from collections.abc import Callable

import jax.numpy as jnp

from lljax.build import mesh_of, placed_model
from lljax.planning import hlo
from lljax.planning.devices import Target
from lljax.training import fit, flops
from lljax.training.curriculum import Stage, stages
from lljax.training.placement import abstract_batch, check_rows, layout_of
from lljax.training.step import take_apart

MARGIN = 0.03                                # of the device's memory, for what the runtime keeps to itself


@dataclasses.dataclass(frozen=True)
class Options:
    """efficiency: share of the peak arithmetic that the run is taken to reach. host: bytes of host memory a device, that of
    a typical node where it is None. progress: told what is compiled next.
    """

    efficiency: float = 0.5
    host: int | None = None
    progress: Callable[[str], None] = lambda text: None

    def room(self, target: Target) -> tuple[float, float]:
        """Bytes of a device and of its host that a run may use."""
        return target.device.memory * (1 - MARGIN), self.host or target.device.host


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """FLOPs and tokens are of one optimizer step of all devices, collectives bytes that one device receives in it, seconds
    of one step. seconds: the largest of the arithmetic (at the efficiency), memory and network bounds.
    """

    stage: Stage
    need: fit.Need
    reason: str                              # for the context-parallel mode
    fits: bool
    model_flops: float
    hardware_flops: float
    collectives: dict
    tokens: int
    bounds: dict
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())


def plan(config, hf_config: dict, target: Target, options: Options) -> list[StagePlan]:
    """The plan of every stage.

    Raises:
      ConfigError: the configuration cannot be laid out on the target, or its compiler is missing.
    """
    return [plan_stage(config, hf_config, target, stage, options) for stage in stages(config.context)]


def plan_stage(config, hf_config: dict, target: Target, stage: Stage, options: Options, *, label: str = "") -> StagePlan:
    """Compiles one stage's step for the target. label: what the tables call it, if not by its stage."""
    device, mesh, label = target.device, mesh_of(config.mesh, target.devices()), label or stage.label
    check_rows(config.training.rows, mesh)
    model = placed_model(config, hf_config, mesh)
    layout, reason = layout_of(mesh, config.mesh.context_parallel, stage.pattern, stage.length, model.spec,
                               bytes_per=jnp.dtype(config.model.dtype).itemsize, memory=device.memory)
    options.progress(f"{label} for {target.name}")
    began = time.monotonic()
    A, B, T = config.training.accumulate, config.training.rows, stage.length
    parts, batch = take_apart(config, model, mesh), abstract_batch(A, B, T, mesh)
    need, program = fit.compile_step(label, parts, batch, stage.pattern, layout)
    seconds = time.monotonic() - began
    text = program.as_text() if program else ""
    collectives = hlo.collective_bytes(text) if program else {}
    workspace = hlo.cudnn_workspace(text)    # which a compiler with no device puts at 0
    need = dataclasses.replace(need, temporary=need.temporary + workspace, peak=need.peak + workspace)
    counted = flops.of_step(model, config, stage, parts=mesh.shape["sequence"])
    passes = 2 if config.memory.remat == "none" else 3       # the weights are read forward, again, and backward
    bounds = {"arithmetic": counted.hardware / (target.count * device.flops * options.efficiency),
              "memory": A * passes * need.base * target.count / device.bandwidth,
              "network": sum(collectives.values()) / device.link}
    return StagePlan(stage, need, reason, need.fits(*options.room(target)), counted.model, counted.hardware, collectives,
                     A * B * T, bounds, seconds)
