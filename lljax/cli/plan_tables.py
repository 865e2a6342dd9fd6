"""The work of `lljax plan`: its tables and advice."""

import math

from rich.table import Table

from lljax.build import open_run_config
from lljax.cli.console import console
from lljax.config import Config
from lljax.hardware.chips import GiB
from lljax.hardware.targets import Target, target
from lljax.planning import fit, search
from lljax.planning import plan as planning
from lljax.planning.plan import Options, StagePlan

CONSOLE = console(least=160)


def plan_run(
    config: Config,
    device: str,
    *,
    efficiency: float,
    host_memory: int | None = None,
    searched: str | None = None,
) -> bool:
    """Prints the plan of a run on `device`, and advice if it does not fit; returns whether it does.

    efficiency: share of the peak arithmetic. host_memory: bytes per device. searched: a function of
      lljax.planning.search, whose answer is printed in place of the schedule's time.

    Raises:
      ConfigError: no such device, or the run cannot be laid out on it.
    """
    chosen = target(device)
    hf_config = open_run_config(config)
    with CONSOLE.status(f"compiling for {chosen.name}") as status:
        options = Options(efficiency, host_memory, lambda text: status.update(f"compiling {text}"))
        if searched:
            _search(searched, config, hf_config, chosen, options)
            return True
        plans = planning.plan(config, hf_config, chosen, options)
        show(plans, chosen, options)
        hours = sum(p.seconds * (p.stage.stop - p.stage.start) for p in plans) / 3600
        CONSOLE.print(
            f"The schedule takes at least {hours:.2f} hours, "
            f"{chosen.count * hours:.2f} device-hours."
        )
        fits = all(p.fits for p in plans)
        if not fits:
            advise(config, hf_config, chosen, plans, options)
        return fits


def _search(name: str, config: Config, hf_config: dict, chosen: Target, options: Options) -> None:
    answer, plans = getattr(search, name)(config, hf_config, chosen, options)
    show(plans, chosen, options)
    CONSOLE.print(f"{answer}.")


def show(plans: list[StagePlan], target: Target, options: Options) -> None:
    """Prints the tables of memory and time, and the context parallelism of each stage."""
    device = target.device
    CONSOLE.print(
        fit.table(
            [need for p in plans for need in p.needs],
            *options.room(target),
            f"{target.name}: {target.count} x {device.memory / GiB:.2f} GiB",
        )
    )
    CONSOLE.print(time_table(plans, options))
    for p in plans:
        if p.need.context_parallel != "none":
            CONSOLE.print(
                f"{p.need.label}: context parallelism {p.need.context_parallel}, {p.reason}"
            )


def time_table(plans: list[StagePlan], options: Options) -> Table:
    """Arithmetic, traffic and time of a step, a row a stage."""
    table = Table(title=f"a step, at {options.efficiency:.0%} of peak arithmetic")
    for column in (
        "stage",
        "model PFLOP",
        "hardware PFLOP",
        "received GB per device",
        "bound by",
        "seconds",
        "tokens/s",
        "compiled in",
    ):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    for p in plans:
        received = ", ".join(
            f"{kind} {size / 1e9:.2f}" for kind, size in p.collectives.items() if size > 1e6
        )
        table.add_row(
            p.need.label,
            f"{p.model_flops / 1e15:.2f}",
            f"{p.hardware_flops / 1e15:.2f}",
            received or "-",
            max(p.bounds, key=lambda bound: p.bounds[bound]),
            f"{p.seconds:.2f}",
            f"{p.tokens / p.seconds:,.0f}",
            f"{p.compile_seconds:.0f} s",
        )
    return table


def advise(
    config: Config, hf_config: dict, target: Target, plans: list[StagePlan], options: Options
) -> None:
    """Prints settings under which the run fits, each of them compiled."""
    lacking = [p for p in plans if not p.fits]
    worst = max(lacking, key=lambda p: max(need.peak for need in p.needs))
    settings, tried = search.room(config, hf_config, target, worst, options)
    if tried:
        needs = [need for p in tried for need in p.needs]
        CONSOLE.print(fit.table(needs, *options.room(target), "tried"))
    held, memory = search.held(worst), target.device.memory
    if held > options.room(target)[0]:
        CONSOLE.print(
            f"Weights and optimizer alone are {held / GiB:.2f} GiB of a device of "
            f"{memory / GiB:.2f}: quantize the base (model.quantize), or spread it over "
            f"{math.ceil(held * target.count / memory)} devices or more."
        )
    if settings:
        CONSOLE.print(f"It does not fit. Compiled, and fits: {'; or '.join(settings)}.")
    else:
        CONSOLE.print(
            "It does not fit, nor with any of these: make the stage shorter "
            "(--search=context finds the longest)."
        )
