"""What a run needs, before any weight is read: every stage's real step and evaluation compiled for
the real target.

Memory comes from the compiler, but for the workspace of cuDNN, which only a device would tell it;
arithmetic is counted by `lljax.planning.flops`; traffic is read from the program.
"""

import dataclasses
import time
from collections.abc import Callable

from lljax.build import mesh_of, placed_model
from lljax.hardware.host_memory import usable
from lljax.hardware.targets import Target
from lljax.planning import fit, flops, hlo
from lljax.training.curriculum import Stage, stages
from lljax.training.placement import check_rows
from lljax.training.prepare import prepare_step

MARGIN = 0.03  # of the device's memory, for what the runtime keeps to itself


@dataclasses.dataclass(frozen=True)
class Options:
    """efficiency: share of the peak arithmetic that the run is taken to reach. host: bytes of host
    memory a device, that of a typical node where it is None. progress: told what is compiled next.
    """

    efficiency: float = 0.5
    host: int | None = None
    progress: Callable[[str], None] = lambda text: None

    def room(self, target: Target) -> tuple[float, float]:
        """Bytes of a device's memory that a run may use, and of host memory for its residuals."""
        return target.device.memory * (1 - MARGIN), usable(self.host or target.device.host)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """FLOPs and tokens are of one optimizer step of all devices, collectives bytes that one device
    receives in it, seconds of one step. seconds: the largest of the arithmetic (at the efficiency),
    memory and network bounds. evaluation: the need of an evaluation at the stage's length; None if
    the run has none there, or the step does not fit. fits: both fit.
    """

    stage: Stage
    need: fit.Need
    evaluation: fit.Need | None
    reason: str  # for the context-parallel mode
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

    @property
    def needs(self) -> list[fit.Need]:
        return [self.need] if self.evaluation is None else [self.need, self.evaluation]


def plan(config, hf_config: dict, target: Target, options: Options) -> list[StagePlan]:
    """The plan of every stage.

    Raises:
      ConfigError: the configuration cannot be laid out on the target, or its compiler is missing.
    """
    plans = [
        plan_stage(config, hf_config, target, stage, options) for stage in stages(config.context)
    ]
    room = options.room(target)
    with_pool = fit.with_pool([p.need for p in plans], target.device.platform, room[1])
    return [
        dataclasses.replace(p, need=need, fits=p.fits and need.fits(*room))
        for p, need in zip(plans, with_pool)
    ]


def plan_stage(
    config, hf_config: dict, target: Target, stage: Stage, options: Options, *, label: str = ""
) -> StagePlan:
    """Compiles one stage's step and evaluation for the target. label: what the tables call it, if
    not by its stage.
    """
    device, mesh, T = target.device, mesh_of(config.mesh, target.devices()), stage.length
    check_rows(config.training.rows, mesh)
    options.progress(f"{label or stage.label} for {target.name}")
    began = time.monotonic()
    evaluated = T in fit.evaluation_lengths(config, stages(config.context))
    model = placed_model(config, hf_config, mesh)
    prepared = prepare_step(
        config,
        hf_config,
        mesh,
        model=model,
        memory=device.memory,
        stages=[stage],
        evaluation_lengths=[T] if evaluated else [],
    )
    program = prepared.steps[stage.number]
    need = fit.need_of(program, prepared)
    seconds = time.monotonic() - began
    text = program.compile().as_text() if need.compiled else ""
    collectives = hlo.collective_bytes(text) if text else {}
    workspace = hlo.cudnn_workspace(text)  # which a compiler with no device puts at 0
    need = dataclasses.replace(
        need,
        label=label or need.label,
        temporary=need.temporary + workspace,
        peak=need.peak + workspace,
    )
    room = options.room(target)
    evaluation = None
    if need.fits(*room) and evaluated:
        evaluation = fit.need_of(prepared.evaluations[T], prepared)
    counted = flops.of_step(model, config, stage, parts=mesh.shape["sequence"])
    # the weights are read forward, again, and backward
    passes = 2 if config.memory.remat == "none" else 3
    bounds = {
        "arithmetic": counted.hardware / (target.count * device.flops * options.efficiency),
        "memory": config.training.accumulate * passes * need.base * target.count / device.bandwidth,
        "network": sum(collectives.values()) / device.link,
    }
    fits = need.fits(*room) and (evaluation is None or evaluation.fits(*room))
    return StagePlan(
        stage,
        need,
        evaluation,
        program.reason,
        fits,
        counted.model,
        counted.hardware,
        collectives,
        config.training.accumulate * config.training.rows * T,
        bounds,
        seconds,
    )
