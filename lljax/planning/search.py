"""The longest context, the largest batch, the fewest devices, and the settings that make a run fit:
each answer is compiled, none is estimated.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

from lljax.build import mesh_of
from lljax.config import Config, get
from lljax.errors import ConfigError
from lljax.hardware.targets import Target, counts, sized
from lljax.models.families import spec_from_hf
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.sharding import row_parts
from lljax.planning import fit
from lljax.planning.fit import words
from lljax.planning.plan import Options, StagePlan, plan_stage
from lljax.training.curriculum import Stage, stages

MOST_TRIES = 10


def longest_context(
    config: Config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The longest last stage that fits, to within a sixteenth, as a sentence; and the plans tried,
    including one that does not fit.
    """
    last, mesh = stages(config.context)[-1], mesh_of(config.mesh, target.devices())
    # 2: rows are cut into balanced halves
    unit = 2 * mesh.shape["sequence"] * mesh.shape["tensor"]

    def plan_of(length: int) -> StagePlan:
        changed = config.copy_and_resolve_references()
        changed.context.length = max(length, changed.context.length)
        changed.context.schedule = ((last.stop, length, last.pattern.kind),)
        return plan_stage(changed, hf_config, target, stages(changed.context)[0], options)

    best, plans = _largest(plan_of, last.length, unit, 1 / 16, "tokens per row")
    shorter = [f"{p.stage.length:,}" for p in plans if not p.fits and p.stage.length < best]
    but = f", though {' and '.join(shorter)} did not fit" if shorter else ""
    return f"The longest context that fits, of those tried, is {best:,} tokens{but}", plans


def largest_batch(
    config: Config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The most `training.rows` that fit at the last stage, as a sentence; and the plans tried,
    including one that does not fit.
    """
    last, mesh = stages(config.context)[-1], mesh_of(config.mesh, target.devices())

    def plan_of(rows: int) -> StagePlan:
        changed = config.copy_and_resolve_references()
        changed.training.rows = rows
        return plan_stage(
            changed, hf_config, target, last, options, label=f"{last.label}, {rows} rows"
        )

    best, plans = _largest(plan_of, config.training.rows, row_parts(mesh), 0, "rows")
    return f"The largest batch that fits is training.rows={best}", plans


def fewest_devices(
    config: Config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The fewest devices of the kind of `target` that the last stage fits on, as a sentence; and
    the plans tried, including the next smaller number.

    Raises:
      ConfigError: the mesh is of a fixed number of devices, or no number fits.
    """
    if -1 not in config.mesh.values():
        raise ConfigError(
            "--search=devices: the mesh has a fixed number of devices: set the axis that is to "
            "grow, such as mesh.sequence, to -1"
        )
    last, plans, refused = stages(config.context)[-1], [], ""
    for count in counts(target.device):
        larger = sized(target.device, count)
        label = f"{last.label}, {larger.name}"
        try:
            plans.append(plan_stage(config, hf_config, larger, last, options, label=label))
        except ConfigError as error:  # rows, heads or mesh do not spread over so many
            refused = f"{larger.name}: {error}"
            continue
        if plans[-1].fits:
            return f"The smallest that fits is --device={larger.name}", plans
    raise ConfigError(
        f"--search=devices: no number of {target.device.name} fits"
        + (f" ({refused})" if refused else "")
    )


def _largest(
    plan_of: Callable[[int], StagePlan], start: int, unit: int, grain: float, noun: str
) -> tuple[int, list[StagePlan]]:
    """The largest multiple n of `unit` whose plan fits, to within `grain` times n, and all plans
    tried in order of n.

    Memory is not monotone in n: a compiler may pack a longer row better. With a grain, the search
    therefore continues past the first n that does not fit until three in a row do not fit.

    noun: the noun that n counts, for the error.
    """
    tried: dict[int, StagePlan] = {}

    def fits(n: int) -> bool:
        if n not in tried:
            tried[n] = plan_of(n)
        return tried[n].fits

    low = max(unit, start // unit * unit)
    high = 2 * low
    if fits(low):
        while fits(high):
            low, high = high, 2 * high
    else:
        low, high = low // 2 // unit * unit, low
        while low and not fits(low):
            low, high = low // 2 // unit * unit, low
        if not low:
            raise ConfigError(
                f"--search: not even {high} {noun} fit: --search=devices finds how many devices "
                "it takes"
            )
    while high - low > max(unit, grain * low):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    n, misses = high, 1
    while grain and misses < 3:
        n = (n + max(unit, int(grain * n))) // unit * unit
        low, misses = (n, 0) if fits(n) else (low, misses + 1)
    return low, [tried[n] for n in sorted(tried)]


@dataclasses.dataclass
class _Attempts:
    """Changes of a configuration that were compiled for the stage that does not fit.

    fitting: the changes that make it fit, as a user writes them.
    plans: the plans of all changes.
    """

    config: Config
    hf_config: dict
    target: Target
    stage: Stage
    options: Options
    fitting: list[str] = dataclasses.field(default_factory=list)
    plans: list[StagePlan] = dataclasses.field(default_factory=list)

    @property
    def enough(self) -> bool:
        return len(self.fitting) == 3 or len(self.plans) == MOST_TRIES

    def add(self, changes: dict, target: Target) -> bool:
        """Whether the stage fits `target` with `changes`."""
        changed = self.config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        name = words(changes)
        if target is not self.target:
            name = f"--device={target.name} {name}"
        label = f"{self.stage.label}, {name}"
        try:
            plan = plan_stage(
                changed, self.hf_config, target, self.stage, self.options, label=label
            )
        except ConfigError:  # layers, heads or tokens do not divide so
            return False
        self.plans.append(plan)
        if plan.fits:
            self.fitting.append(name)
        return plan.fits


def room(
    config: Config, hf_config: dict, target: Target, worst: StagePlan, options: Options
) -> tuple[list[str], list[StagePlan]]:
    """At most three settings that make the stage with the largest need fit, the cheapest first, and
    all plans tried; at most MOST_TRIES compilations.

    Everything that saves memory on the same devices is tried at once first. If that is not enough,
    no part of it is, and the row must be spread over more devices.
    """
    attempts = _Attempts(
        config=config, hf_config=hf_config, target=target, stage=worst.stage, options=options
    )
    memory, host = options.room(target)
    lacking = next(need for need in worst.needs if not need.fits(memory, host))
    of_host = lacking.compiled and lacking.peak <= memory
    steps = fit.rollout_ways(config)
    if not lacking.writes:  # the rollout was not compiled, and may not fit either
        steps = [*fit.ways(config, spec_from_hf(hf_config).layers, of_host), *steps]
    everything = _merged(steps)
    if held(worst) < target.device.memory and steps and attempts.add(everything, target):
        sums = [_merged(steps[:n]) for n in range(2, len(steps) + 1)]
        for changes in [*steps, *sums]:
            if not attempts.enough and changes != everything:
                attempts.add(changes, target)
        attempts.fitting.append(attempts.fitting.pop(0))  # the most expensive comes last
    _spread(attempts, worst, everything)
    return attempts.fitting, attempts.plans


def _spread(attempts: _Attempts, worst: StagePlan, everything: dict) -> None:
    """Attempts to spread a row over the devices of the target, and over more: its tokens, or its
    heads if answers are written, a token at a time.
    """
    target, device = attempts.target, attempts.target.device
    axis = "tensor" if OBJECTIVES[attempts.config.objective.name].samples else "sequence"
    mesh = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 1, f"mesh.{axis}": -1}
    spread = {name: size for name, size in mesh.items() if get(attempts.config, name) != size}
    for count in counts(device):
        if count < target.count or held(worst) * target.count > count * device.memory:
            continue
        if count == target.count and (count == 1 or not spread):  # the present configuration
            continue
        for changes in (spread, spread | everything):
            if not attempts.enough:
                attempts.add(changes, target if count == target.count else sized(device, count))


def held(plan: StagePlan) -> int:
    """Bytes of a device that weights and optimizer take, whatever the length of the row."""
    return plan.need.base + plan.need.trainable + plan.need.optimizer


def _merged(changes: list[dict]) -> dict:
    return functools.reduce(operator.or_, changes, {})
