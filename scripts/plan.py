"""Says before any machine is rented whether a run fits, how long it takes, and what stops it.

python scripts/plan.py --config=configs/qwen_32k.py --device=h100-80g:8
python scripts/plan.py --config=configs/qwen_32k.py --device=v5e-8 --search=context

Compiles the real training step of every stage for the real device, with no weights and no device: `pip install -e
'.[plan-tpu]'` or `'.[plan-gpu]'` brings the compilers. Exit code 1 where it does not fit.
"""

import logging
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
                    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
    os.environ.setdefault(name, value)

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from lljax.command_line import read_flags
from lljax.config import validate
from lljax.devices import GiB
from lljax.errors import exit_cleanly
from lljax.interop.base import open_config
from lljax.planning import plan as planning
from lljax.planning.devices import target

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), see configs/.", lock_config=True)
DEVICE = flags.DEFINE_string("device", None, "h100-80g:8, a100-80g, a10-24g, l4, rtx4090, h200, b200, v5e-8, v5p-8, v6e-8 ...")
SEARCH = flags.DEFINE_enum("search", None, ["context"], "Find the longest last stage that fits.")
HOST = flags.DEFINE_float("host_gb", None, "Host memory a device, GB; that of a typical node where it is not given.")
EFFICIENCY = flags.DEFINE_float("efficiency", 0.4, "Share of the peak arithmetic that the run is taken to reach.")
CONSOLE = Console(width=140)


def show(plans, target) -> None:
    device = target.device
    table = Table(title=f"{target.name}: {target.count} x {device.memory / GiB:.1f} GiB; GiB a device")
    for column in ("stage", "parallel", "base", "trained", "optimizer", "temporary", "peak", "host", "fits"):
        table.add_column(column, justify="left" if column in ("stage", "parallel", "fits") else "right")
    for p in plans:
        table.add_row(p.stage.label, p.context_parallel, *(f"{size / GiB:.2f}" for size in (
            p.base, p.trainable, p.optimizer, p.temporary, p.peak, p.host)), "yes" if p.fits else "NO")
    CONSOLE.print(table)
    table = Table(title=f"a step, at {EFFICIENCY.value:.0%} of peak arithmetic")
    for column in ("stage", "model PFLOP", "hardware PFLOP", "received GB a device", "bound by", "seconds", "tokens/s",
                   "compiled in"):
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    total = 0.0
    for p in plans:
        total += p.seconds * (p.stage.stop - p.stage.start)
        received = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in p.collectives.items() if size > 1e6) or "-"
        table.add_row(p.stage.label, f"{p.model_flops / 1e15:.2f}", f"{p.hardware_flops / 1e15:.2f}", received,
                      max(p.bounds, key=p.bounds.get), f"{p.seconds:.2f}", f"{p.tokens / p.seconds:,.0f}",
                      f"{p.compile_seconds:.0f} s")
    CONSOLE.print(table)
    CONSOLE.print(f"The schedule takes at least {total / 3600:.2f} hours, {target.count * total / 3600:.2f} device-hours.")


def advice(config, plans, target) -> str:
    """Settings that make room, those first that cost least."""
    m, worst = config.memory, max(plans, key=lambda p: p.peak)
    ways = []
    if worst.base > 0.5 * target.device.memory:
        ways.append(f"more devices: the base alone is {worst.base / GiB:.1f} GiB on each (mesh.fsdp or mesh.sequence)")
    if m.tile == 0:
        ways.append("memory.tile=4096")
    if not m.offload:
        ways.append("memory.offload=True")
    if m.layers_per_residual == 1:
        ways.append("memory.layers_per_residual=4")
    if config.mesh.sequence == 1:
        ways.append("mesh.sequence=8, on as many devices")
    ways.append("a shorter stage: --search=context finds the longest")
    return "; ".join(ways[:3])


def main(argv) -> None:
    logging.basicConfig(level=logging.ERROR)
    with exit_cleanly():
        read_flags(argv, "config", "device")
        config, chosen = CONFIG.value, target(DEVICE.value)
        with config.unlocked():
            config.data.train = config.data.train or ("-",)  # no document is read
        validate(config)
        hf_config = open_config(config.model.path, config.model.revision)
        options = {"efficiency": EFFICIENCY.value, "host": HOST.value and int(HOST.value * 1e9)}
        with CONSOLE.status(f"compiling for {chosen.name}"):
            if SEARCH.value:
                longest, plans = planning.longest_context(config, hf_config, chosen, **options)
            else:
                plans = planning.plan(config, hf_config, chosen, **options)
        show(plans, chosen)
        if SEARCH.value:
            CONSOLE.print(f"The longest context that fits: {longest:,} tokens.")
        elif not all(p.fits for p in plans):
            CONSOLE.print(f"It does not fit. What would make room: {advice(config, plans, chosen)}.")
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv)
