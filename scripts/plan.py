"""Says before any machine is rented whether a run fits, how long it takes, and what stops it.

python scripts/plan.py --config=configs/qwen_32k.py --device=h100-80g:8
python scripts/plan.py --config=configs/qwen_32k.py --device=v5e-8 --search=context
python scripts/plan.py --config=run.yaml --device=rtx4090 --config.model.quantize=nf4

Compiles the real training step of every stage for the real device, with no weights and no device:
  `pip install -e '.[plan-tpu]'` or `'.[plan-gpu]'` brings the compilers. Exit code 1 where it does
  not fit.
"""

import logging
import math
import sys

import off_device  # noqa: F401
from absl import flags
from rich.table import Table

from lljax.build import open_run_config
from lljax.cli.console import console
from lljax.config import validate
from lljax.config.flags import config_flag, read_flags
from lljax.errors import exit_cleanly
from lljax.hardware.chips import GiB
from lljax.hardware.targets import target
from lljax.planning import fit, search
from lljax.planning import plan as planning

CONFIG = config_flag()
DEVICE = flags.DEFINE_string(
    "device",
    None,
    "h100-80g:8 (eight of them), a100-80g, a10-24g, l4, rtx4090, rtx4060-8g, b200, "
    "v5e-8, v5p-8 ...",
)
SEARCHES = {
    "context": search.longest_context,
    "batch": search.largest_batch,
    "devices": search.fewest_devices,
}
SEARCH = flags.DEFINE_enum(
    "search",
    None,
    list(SEARCHES),
    "Find the longest last stage, or the most rows of it, or the fewest devices, that fit.",
)
HOST = flags.DEFINE_float(
    "host_gb", None, "Host memory a device, GB; that of a typical node where it is not given."
)
EFFICIENCY = flags.DEFINE_float(
    "efficiency", 0.4, "Share of the peak arithmetic that the run is taken to reach."
)
CONSOLE = console(least=160)


def show(plans, target, options) -> None:
    device = target.device
    CONSOLE.print(
        fit.table(
            [need for p in plans for need in p.needs],
            *options.room(target),
            f"{target.name}: {target.count} x {device.memory / GiB:.2f} GiB",
        )
    )
    table = Table(title=f"a step, at {EFFICIENCY.value:.0%} of peak arithmetic")
    for column in (
        "stage",
        "model PFLOP",
        "hardware PFLOP",
        "received GB a device",
        "bound by",
        "seconds",
        "tokens/s",
        "compiled in",
    ):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    for p in plans:
        received = (
            ", ".join(
                f"{kind} {size / 1e9:.2f}" for kind, size in p.collectives.items() if size > 1e6
            )
            or "-"
        )
        table.add_row(
            p.need.label,
            f"{p.model_flops / 1e15:.2f}",
            f"{p.hardware_flops / 1e15:.2f}",
            received,
            max(p.bounds, key=p.bounds.get),
            f"{p.seconds:.2f}",
            f"{p.tokens / p.seconds:,.0f}",
            f"{p.compile_seconds:.0f} s",
        )
    CONSOLE.print(table)
    for p in plans:
        if p.need.context_parallel != "none":
            CONSOLE.print(
                f"{p.need.label}: context parallelism {p.need.context_parallel}, {p.reason}"
            )


def advise(config, hf_config, target, plans, options) -> None:
    """Prints the settings that would make it fit, each of them compiled."""
    worst = max((p for p in plans if not p.fits), key=lambda p: p.need.peak)
    found, tried = search.room(config, hf_config, target, worst, options)
    if tried:
        CONSOLE.print(
            fit.table(
                [need for p in tried for need in p.needs], *options.room(target), "what was tried"
            )
        )
    if search.held(worst) > options.room(target)[0]:
        least = math.ceil(search.held(worst) * target.count / target.device.memory)
        CONSOLE.print(
            f"Weights and optimizer alone are {search.held(worst) / GiB:.2f} GiB of a device of "
            f"{target.device.memory / GiB:.2f}: quantise the base (model.quantize), or spread it over {least} "
            "devices or more."
        )
    if found:
        CONSOLE.print(f"It does not fit. Compiled, and fits: {'; or '.join(found)}.")
    else:
        CONSOLE.print(
            "It does not fit, nor with any of these: make the stage shorter (--search=context finds the longest)."
        )


def main(argv) -> None:
    logging.basicConfig(level=logging.ERROR, force=True)
    with exit_cleanly():
        read_flags(argv, __doc__, "config", "device")
        config, chosen = CONFIG.value, target(DEVICE.value)
        with config.unlocked():
            config.data.train = config.data.train or ("-",)  # no document is read
        validate(config)
        hf_config = open_run_config(config)
        with CONSOLE.status(f"compiling for {chosen.name}") as status:
            options = planning.Options(
                EFFICIENCY.value,
                HOST.value and int(HOST.value * 1e9),
                lambda text: status.update(f"compiling {text}"),
            )
            if SEARCH.value:
                answer, plans = SEARCHES[SEARCH.value](config, hf_config, chosen, options)
                show(plans, chosen, options)
                CONSOLE.print(f"{answer}.")
                return
            plans = planning.plan(config, hf_config, chosen, options)
            show(plans, chosen, options)
            hours = sum(p.seconds * (p.stage.stop - p.stage.start) for p in plans) / 3600
            CONSOLE.print(
                f"The schedule takes at least {hours:.2f} hours, {chosen.count * hours:.2f} device-hours."
            )
            if not all(p.fits for p in plans):
                advise(config, hf_config, chosen, plans, options)
                sys.exit(1)


if __name__ == "__main__":
    main(sys.argv)
