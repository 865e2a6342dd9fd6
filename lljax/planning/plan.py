"""The plan of a run, before any weight is read: the real step, rollout and evaluation of every
stage, compiled for the real target.

Memory comes from the compiler, except for the workspace of cuDNN, which only a device would report;
arithmetic is counted by `lljax.planning.flops`; traffic is read from the program.
"""

import dataclasses
import time
from collections.abc import Callable

from lljax.build import mesh_of, placed_model
from lljax.config import Config
from lljax.hardware.host_memory import usable
from lljax.hardware.targets import Target
from lljax.objectives.objective import Passes
from lljax.planning import fit, flops, hlo
from lljax.training.curriculum import Stage, stages
from lljax.training.placement import check_rows
from lljax.training.prepare import Prepared, prepare_step

MARGIN = 0.03  # share of a device's memory that the runtime keeps for itself


@dataclasses.dataclass(frozen=True)
class Options:
    """efficiency: share of the peak arithmetic that the run is assumed to reach.
    host: bytes of host memory per device; None for the memory of a typical node.
    progress: called with the name of the next compilation.
    """

    efficiency: float = 0.5
    host: int | None = None
    progress: Callable[[str], None] = lambda text: None

    def room(self, target: Target) -> tuple[float, float]:
        """Bytes of a device's memory that a run may use, and of host memory for its residuals."""
        return target.device.memory * (1 - MARGIN), usable(self.host or target.device.host)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    need: the memory of the step.
    others: the memory of what runs beside the step: the scorer of its batch, the rollout that
      writes it, for the longest prompt, and an evaluation at the stage's length, if the run has
      them and the step fits.
    reason: why this context-parallel mode was chosen.
    fits: all of them fit.
    model_flops, hardware_flops, tokens: counts of one optimizer step on all devices.
    collectives: bytes that one device receives in a step, by kind of collective.
    bounds: seconds of a step by its arithmetic (at the efficiency), memory and network.
    """

    stage: Stage
    need: fit.Need
    others: tuple[fit.Need, ...]
    reason: str
    fits: bool
    model_flops: float
    hardware_flops: float
    collectives: dict[str, int]
    tokens: int
    bounds: dict[str, float]
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """A lower bound of the seconds of one step."""
        return max(self.bounds.values())

    @property
    def needs(self) -> list[fit.Need]:
        return [self.need, *self.others]


def plan(config: Config, hf_config: dict, target: Target, options: Options) -> list[StagePlan]:
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
        for p, need in zip(plans, with_pool, strict=True)
    ]


def plan_stage(
    config: Config,
    hf_config: dict,
    target: Target,
    stage: Stage,
    options: Options,
    *,
    label: str = "",
) -> StagePlan:
    """Compiles the step, the rollout and the evaluation of one stage for the target.

    label: name of the stage in tables; empty for its own.
    """
    mesh, room = mesh_of(config.mesh, target.devices()), options.room(target)
    check_rows(config.training.rows, mesh)
    options.progress(f"{label or stage.label} for {target.name}")
    evaluates = stage.length in fit.evaluation_lengths(config, stages(config.context))
    model = placed_model(config, hf_config, mesh)
    began = time.monotonic()
    prepared = prepare_step(
        config,
        hf_config,
        mesh,
        model=model,
        memory=target.device.memory,
        stages=[stage],
        evaluation_lengths=[stage.length] if evaluates else [],
    )
    need, collectives = _compile_step(prepared, stage, label)
    seconds = time.monotonic() - began
    others = []
    if need.fits(*room):
        others = fit.needs_of(prepared.steps[stage.number], prepared)[1:]
        for part in prepared.rollouts.get(stage.number, ()):
            options.progress(f"{part.label} for {target.name}")
            others.append(fit.need_of(part, prepared))
        if evaluates:
            others += fit.needs_of(prepared.evaluations[stage.length], prepared)
    passes, device = prepared.objective.passes(config), target.device
    read = _weight_reads(config, passes) * need.base * target.count
    arithmetic = target.count * device.flops * options.efficiency
    counted = flops.of_step(model, config, stage, parts=mesh.shape["sequence"], passes=passes)
    return StagePlan(
        stage=stage,
        need=need,
        others=tuple(others),
        reason=prepared.steps[stage.number].reason,
        fits=need.fits(*room) and all(other.fits(*room) for other in others),
        model_flops=counted.model,
        hardware_flops=counted.hardware,
        collectives=collectives,
        tokens=config.training.accumulate * config.training.rows * stage.length,
        bounds={
            "arithmetic": counted.hardware / arithmetic,
            "memory": read / device.bandwidth,
            "network": sum(collectives.values()) / device.link,
        },
        compile_seconds=seconds,
    )


def _compile_step(prepared: Prepared, stage: Stage, label: str) -> tuple[fit.Need, dict[str, int]]:
    """The need of a stage's step, and the bytes of its collectives."""
    program = prepared.steps[stage.number]
    need = fit.need_of(program, prepared)
    need = dataclasses.replace(need, label=label or need.label)
    if not need.compiled:
        return need, {}
    text = program.compile().as_text()
    assert text is not None, "every compiler of ours gives the text of its program"
    workspace = hlo.cudnn_workspace(text)  # a compiler without a device reports 0
    need = dataclasses.replace(
        need, temporary=need.temporary + workspace, peak=need.peak + workspace
    )
    return need, hlo.collective_bytes(text)


def _weight_reads(config: Config, passes: Passes) -> int:
    """How often a step reads the weights: forward, and backward, before which rematerialization
    reads them once more.
    """
    backward = 1 if config.memory.remat == "none" else 2
    return config.training.accumulate * (passes.forward + backward * passes.backward)
