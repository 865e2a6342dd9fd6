"""How far a configuration can be pushed on a device, and what makes room for it: found by
compiling, never by guessing.
"""

import functools
import operator

from lljax.build import mesh_of
from lljax.config import get
from lljax.errors import ConfigError
from lljax.hardware.targets import Target, counts, sized
from lljax.models.families import spec_from_hf
from lljax.parallel.sharding import row_parts
from lljax.planning import fit
from lljax.planning.fit import words
from lljax.planning.plan import Options, StagePlan, plan_stage
from lljax.training.curriculum import stages

MOST_TRIES = 10


def longest_context(
    config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The longest last stage that fits, to a sixteenth of it, and the plans tried, among them one
    that does not fit.
    """
    last, mesh = stages(config.context)[-1], mesh_of(config.mesh, target.devices())
    # twice: rows are cut into balanced halves
    unit = 2 * mesh.shape["sequence"] * mesh.shape["tensor"]

    def of(length):
        changed = config.copy_and_resolve_references()
        changed.context.length = max(length, changed.context.length)
        changed.context.schedule = ((last.stop, length, last.pattern.kind),)
        return plan_stage(changed, hf_config, target, stages(changed.context)[0], options)

    best, plans = _largest(of, last.length, unit, 1 / 16, "tokens a row")
    shorter = [f"{p.stage.length:,}" for p in plans if not p.fits and p.stage.length < best]
    but = f", though {' and '.join(shorter)} did not fit" if shorter else ""
    return f"The longest context that fits, of those tried, is {best:,} tokens{but}", plans


def largest_batch(
    config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The most `training.rows` that fit at the last stage, and the plans tried, among them one that
    does not fit.
    """
    last, mesh = stages(config.context)[-1], mesh_of(config.mesh, target.devices())

    def of(rows):
        changed = config.copy_and_resolve_references()
        changed.training.rows = rows
        return plan_stage(
            changed, hf_config, target, last, options, label=f"{last.label}, {rows} rows"
        )

    best, plans = _largest(of, config.training.rows, row_parts(mesh), 0, "rows")
    return f"The largest batch that fits is training.rows={best}", plans


def fewest_devices(
    config, hf_config: dict, target: Target, options: Options
) -> tuple[str, list[StagePlan]]:
    """The fewest devices of the kind of `target` that fit the last stage, and the plans tried, the
    next fewer among them.
    """
    if -1 not in config.mesh.values():
        raise ConfigError(
            "--search=devices: the mesh is of a fixed number of devices: set the axis of it that is to grow, "
            "such as mesh.sequence, to -1"
        )
    last, plans, refused = stages(config.context)[-1], [], ""
    for count in counts(target.device):
        of = sized(target.device, count)
        try:
            plans.append(
                plan_stage(config, hf_config, of, last, options, label=f"{last.label}, {of.name}")
            )
        except ConfigError as error:  # rows, heads or mesh do not spread over so many
            refused = f"{of.name}: {error}"
            continue
        if plans[-1].fits:
            return f"The smallest that fits is --device={of.name}", plans
    raise ConfigError(
        f"--search=devices: no number of {target.device.name} fits"
        + (f" ({refused})" if refused else "")
    )


def _largest(of, start: int, unit: int, grain: float, what: str) -> tuple[int, list[StagePlan]]:
    """The largest multiple n of `unit` whose plan `of(n)` fits, to `grain` of it, and all plans
    tried in order of n.

    Memory is not monotone in n: a compiler may pack a longer row better. With a grain, the search
      therefore continues past the first n that does not fit until three in a row do not fit.
    """
    tried: dict[int, StagePlan] = {}

    def fits(n):
        if n not in tried:
            tried[n] = of(n)
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
                f"--search: not even {high} {what} fit: --search=devices finds how many devices it takes"
            )
    while high - low > max(unit, grain * low):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    n, misses = high, 1
    while grain and misses < 3:
        n = (n + max(unit, int(grain * n))) // unit * unit
        low, misses = (n, 0) if fits(n) else (low, misses + 1)
    return low, [tried[n] for n in sorted(tried)]


def room(
    config, hf_config: dict, target: Target, worst: StagePlan, options: Options
) -> tuple[list[str], list[StagePlan]]:
    """At most three settings with which the stage that needs most does fit, those first that cost
    least, and all plans tried.

    At most MOST_TRIES compilations. What saves memory on the same devices is tried all at once
    first: where that is not enough no part of it is, and the row must be spread over more devices.
    """
    found, plans = [], []

    def attempt(changes: dict, on: Target) -> bool:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        name = words(changes) if on is target else f"--device={on.name} {words(changes)}"
        try:
            plans.append(
                plan_stage(
                    changed,
                    hf_config,
                    on,
                    worst.stage,
                    options,
                    label=f"{worst.stage.label}, {name}",
                )
            )
        except ConfigError:  # layers, heads or tokens do not divide so
            return False
        if plans[-1].fits:
            found.append(name)
        return plans[-1].fits

    def enough():
        return len(found) == 3 or len(plans) == MOST_TRIES

    of_host = (
        worst.need.compiled
        and worst.need.peak <= options.room(target)[0]
        and worst.need.host > options.room(target)[1]
    )
    steps = fit.ways(config, spec_from_hf(hf_config).layers, of_host)
    sums = [_merged(steps[:n]) for n in range(2, len(steps) + 1)]
    everything = _merged(steps)
    if held(worst) < target.device.memory and steps and attempt(everything, target):
        for changes in [*steps, *sums]:
            if not enough() and changes != everything:
                attempt(changes, target)
        found.append(found.pop(0))  # what costs most comes last
    spread = {
        field: value
        for field, value in (
            ("mesh.data", 1),
            ("mesh.fsdp", 1),
            ("mesh.expert", 1),
            ("mesh.sequence", -1),
        )
        if get(config, field) != value
    }
    for count in counts(target.device):
        if count < target.count or held(worst) * target.count > count * target.device.memory:
            continue
        if count == target.count and (count == 1 or not spread):  # as it is now
            continue
        for changes in (spread, spread | everything):
            if not enough():
                attempt(changes, target if count == target.count else sized(target.device, count))
    return found, plans


def held(plan: StagePlan) -> int:
    """Bytes of a device that weights and optimizer take, whatever the length of the row."""
    return plan.need.base + plan.need.trainable + plan.need.optimizer


def _merged(changes: list[dict]) -> dict:
    return functools.reduce(operator.or_, changes, {})
