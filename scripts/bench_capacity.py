"""What Llama-3.1-8B needs at length, for devices that are not here: compiled by their own compilers.

python scripts/bench_capacity.py --rows=h100       # the rows whose name holds the word; needs the plan-gpu extra
python scripts/bench_capacity.py --rows=v5         # needs the plan-tpu extra, and minutes a row

One row of tokens a step, AdamW in float32 or, where a row says so, eight bits. LoRA of rank 64 on q, k, v and o over a frozen
bfloat16 base; over a quantised one, of rank 32 on every linear layer. No weight is read.
"""

import argparse
import dataclasses
import logging

import off_device  # noqa: F401
from rich.console import Console
from rich.table import Table

from lljax.config import default_config, validate
from lljax.devices import GiB
from lljax.errors import ConfigError, exit_cleanly
from lljax.planning import search
from lljax.planning.devices import target
from lljax.planning.plan import Options, plan_stage
from lljax.training.curriculum import stages

K, M = 1024, 1024 ** 2
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False}


@dataclasses.dataclass(frozen=True)
class Row:
    """attention: of the stage; shifted in groups of 8,192. each: memory.layers_per_residual. find: look for the longest
    row that fits, from `length` on. base: model.quantize, or "trained": train_type="full". tile: memory.tile, and four times
    memory.loss_chunk. optimizer: its name."""

    device: str
    length: int
    attention: str
    each: int = 1
    find: bool = False
    base: str = "none"
    tile: int = 4096
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        return f"{self.device} {self.attention} {self.length // K}k" + (f" {self.base}" if self.base != "none" else "")


ROWS = (
    Row("h100-80g", 512 * K, "full"),
    Row("h100-80g", 768 * K, "shifted"),
    Row("h100-80g", 2 * M, "shifted", each=4),
    Row("h100-80g:8", 4 * M, "full", each=4),
    Row("a10-24g", 64 * K, "full", find=True),
    Row("v5e-8", 512 * K, "full"),
    Row("v5e-8", 1 * M, "shifted"),
    Row("v5p-8", 2 * M, "full", each=2),
    Row("v5e-1", 32 * K, "full"),
    Row("h100-80g", 1 * M, "full", each=2, base="nf4"),
    Row("a10-24g", 128 * K, "full", base="nf4"),
    Row("rtx4080-16g", 64 * K, "full", base="nf4"),
    Row("rtx4060-8g", 8 * K, "full", base="nf4-double", tile=1024, optimizer="adamw8bit"),
    Row("v5e-1", 32 * K, "full", base="nf4"),
    Row("h100-80g", 32 * K, "full", base="trained"),
    Row("h100-80g", 32 * K, "shifted", base="nf4"),
)


def config_of(row: Row):
    c = default_config()
    c.model.path, c.data.train = "-", ("-",)             # neither is read
    c.context.length, c.context.schedule, c.context.group = row.length, ((1, row.length, row.attention),), 8192
    c.lora.rank, c.lora.alpha, c.lora.also_train = 64, 128.0, ()
    if row.base == "trained":
        c.train_type = "full"
    elif row.base != "none":
        c.model.quantize, c.lora.rank, c.lora.targets = row.base, 32, ("all-linear",)
    c.memory.tile, c.memory.offload, c.memory.layers_per_residual = row.tile, True, row.each
    c.memory.loss_chunk, c.optimizer.name = row.tile // 4, row.optimizer
    c.mesh.fsdp, c.mesh.sequence = 1, -1
    validate(c)
    return c


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
        console.print(f"{row.name}: {search.held(plan) / GiB:.2f} GiB of weights on a device of "
                      f"{of.device.memory / GiB:.2f}: quantise the base (model.quantize), or spread it over more devices")
    received = sum(plan.collectives.values()) / 1e9
    return [row.device, row.base, f"{plan.stage.length:,} {row.attention}", plan.need.context_parallel, str(row.each),
            f"{plan.need.peak / GiB:.1f}", f"{plan.need.host / GiB:.1f}", "yes" if plan.fits else "NO",
            f"{plan.tokens / plan.seconds:,.0f}", f"{received:.1f}", f"{plan.compile_seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="those whose name holds this, of: " + "; ".join(row.name for row in ROWS))
    wanted = parser.parse_args().rows
    logging.basicConfig(level=logging.ERROR, force=True)
    console = Console(width=140)
    table = Table(title="Llama-3.1-8B, a row a step; GiB and GB of a device; tokens/s at most, at 40% of peak arithmetic")
    for column in ("device", "base", "stage", "parallel", "layers per residual", "peak", "host", "fits", "tokens/s", "received",
                   "compiled in s"):
        table.add_column(column, justify="left" if column in ("device", "base", "stage", "parallel", "fits") else "right")
    with exit_cleanly():
        rows = [row for row in ROWS if wanted in row.name]
        if not rows:
            raise ConfigError(f"--rows={wanted}: no row's name holds it; there are {'; '.join(row.name for row in ROWS)}")
        for row in rows:
            with console.status(row.name) as status:
                options = Options(0.4, progress=lambda text, status=status: status.update(f"compiling {text}"))
                table.add_row(*measure(row, options, console))
        console.print(table)


if __name__ == "__main__":
    main()
