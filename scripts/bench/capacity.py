"""Memory and speed of Llama-3.1-8B and Qwen3.5 at length, compiled for devices that are not here.

python scripts/bench/capacity.py --rows=h100    # rows with this word; needs the plan-gpu extra
python scripts/bench/capacity.py --rows=v5      # needs the plan-tpu extra, and minutes a row

The runs are the rows of capacity_rows.py. No weight is read.
"""

import logging

import common
import without_devices  # noqa: F401
from capacity_rows import ROWS, Row, config_of, model_of
from rich.console import Console

from lljax.errors import ConfigError, exit_cleanly
from lljax.hardware.chips import GiB
from lljax.hardware.targets import target
from lljax.planning import search
from lljax.planning.plan import Options, plan_stage
from lljax.training.curriculum import stages

TITLE = (
    "A row a step; GiB and GB of a device; beside: the largest program beside the "
    "step; tokens/s of the step at most, at 40% of peak arithmetic"
)
WORDS = ("model", "device", "objective", "base", "stage", "parallel", "fits")
COLUMNS = (
    *("model", "device", "objective", "base", "stage", "parallel", "layers per residual"),
    *("peak", "beside", "host", "fits", "tokens/s", "received", "compiled in s"),
)


def measure(row: Row, options: Options, console: Console) -> list[str]:
    """The cells of a row. Prints the answer of a search, and advice for a row that does not fit."""
    config, model, chosen = config_of(row), model_of(row), target(row.device)
    if row.find:
        answer, plans = search.longest_context(config, model, chosen, options)
        console.print(f"{row.name}: {answer}")
        plan = max((p for p in plans if p.fits), key=lambda p: p.stage.length)
    else:
        stage = stages(config.context)[0]
        plan = plan_stage(config, model, chosen, stage, options)
    if not plan.fits and search.held(plan) > options.room(chosen)[0]:
        console.print(
            f"{row.name}: {search.held(plan) / GiB:.2f} GiB of weights on a device of "
            f"{chosen.device.memory / GiB:.2f}: quantize the base (model.quantize), or spread it "
            "over more devices"
        )
    beside = max((need.peak for need in plan.others), default=0)
    received = sum(plan.collectives.values()) / common.GB
    return [
        row.model,
        row.device,
        row.objective if row.cache == "auto" else f"{row.objective}, {row.cache} cache",
        row.base,
        f"{plan.stage.length:,} {row.attention}",
        plan.need.context_parallel,
        str(row.each),
        f"{plan.need.peak / GiB:.1f}",
        f"{beside / GiB:.1f}" if beside else "-",
        f"{plan.need.host / GiB:.1f}",
        "yes" if plan.fits else "NO",
        f"{plan.tokens / plan.seconds:,.0f}",
        f"{received:.1f}",
        f"{plan.compile_seconds:.0f}",
    ]


def main() -> None:
    names = "; ".join(row.name for row in ROWS)
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default="", help=f"rows whose name contains this, of: {names}")
    wanted = parser.parse_args().rows
    logging.basicConfig(level=logging.ERROR, force=True)
    console = Console(width=160)
    table = common.table(COLUMNS, left=WORDS, title=TITLE)
    with exit_cleanly():
        rows = [row for row in ROWS if wanted in row.name]
        if not rows:
            raise ConfigError(f"--rows={wanted}: no row's name contains it; there are {names}")
        for row in rows:
            with console.status(row.name) as status:
                options = Options(
                    0.4, progress=lambda text, status=status: status.update(f"compiling {text}")
                )
                table.add_row(*measure(row, options, console))
        console.print(table)


if __name__ == "__main__":
    main()
