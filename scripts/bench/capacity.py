"""What Llama-3.1-8B needs at length, for devices that are not here: compiled by their own
compilers.

python scripts/bench_capacity.py --rows=h100       # the rows whose name holds the word; needs the
plan-gpu extra python scripts/bench_capacity.py --rows=v5         # needs the plan-tpu extra, and
minutes a row

The runs are those of `capacity_rows.py`. No weight is read.
"""

import argparse
import logging

import off_device  # noqa: F401
from capacity_rows import LLAMA, ROWS, Row, config_of
from rich.console import Console
from rich.table import Table

from lljax.errors import ConfigError, exit_cleanly
from lljax.hardware.chips import GiB
from lljax.hardware.targets import target
from lljax.planning import search
from lljax.planning.plan import Options, plan_stage
from lljax.training.curriculum import stages


def measure(row: Row, options: Options, console) -> list[str]:
    """The cells of a row; what was advised is printed."""
    config, of = config_of(row), target(row.device)
    if row.find:
        answer, plans = search.longest_context(config, LLAMA, of, options)
        console.print(f"{row.name}: {answer}")
        plan = max((p for p in plans if p.fits), key=lambda p: p.stage.length)
    else:
        plan = plan_stage(config, LLAMA, of, stages(config.context)[0], options)
    if not plan.fits and search.held(plan) > options.room(of)[0]:
        console.print(
            f"{row.name}: {search.held(plan) / GiB:.2f} GiB of weights on a device of "
            f"{of.device.memory / GiB:.2f}: quantise the base (model.quantize), or spread it over more devices"
        )
    received = sum(plan.collectives.values()) / 1e9
    return [
        row.device,
        row.base,
        f"{plan.stage.length:,} {row.attention}",
        plan.need.context_parallel,
        str(row.each),
        f"{plan.need.peak / GiB:.1f}",
        f"{plan.need.host / GiB:.1f}",
        "yes" if plan.fits else "NO",
        f"{plan.tokens / plan.seconds:,.0f}",
        f"{received:.1f}",
        f"{plan.compile_seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        default="",
        help="those whose name holds this, of: " + "; ".join(row.name for row in ROWS),
    )
    wanted = parser.parse_args().rows
    logging.basicConfig(level=logging.ERROR, force=True)
    console = Console(width=140)
    table = Table(
        title="Llama-3.1-8B, a row a step; GiB and GB of a device; tokens/s at most, at 40% of peak arithmetic"
    )
    for column in (
        "device",
        "base",
        "stage",
        "parallel",
        "layers per residual",
        "peak",
        "host",
        "fits",
        "tokens/s",
        "received",
        "compiled in s",
    ):
        table.add_column(
            column,
            justify="left"
            if column in ("device", "base", "stage", "parallel", "fits")
            else "right",
        )
    with exit_cleanly():
        rows = [row for row in ROWS if wanted in row.name]
        if not rows:
            raise ConfigError(
                f"--rows={wanted}: no row's name holds it; there are {'; '.join(row.name for row in ROWS)}"
            )
        for row in rows:
            with console.status(row.name) as status:
                options = Options(
                    0.4, progress=lambda text, status=status: status.update(f"compiling {text}")
                )
                table.add_row(*measure(row, options, console))
        console.print(table)


if __name__ == "__main__":
    main()
