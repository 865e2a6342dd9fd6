"""Plan a run before a machine is rented: whether it fits, how long it takes, its bottleneck.

lljax plan --config=configs/qwen_32k.py --device=h100-80g:8
lljax plan --config=configs/qwen_32k.py --device=v5e-8 --search=context
lljax plan --config=run.yaml --device=rtx4090 --config.model.quantize=nf4

Compiles the training step of every stage for the named device, with no weights and no device. The
extras lljax[plan-tpu] and lljax[plan-gpu] bring the compilers. Exit code 1: it does not fit.
"""

import logging
import sys
from collections.abc import Sequence

from absl import flags

from lljax.config import validate
from lljax.config.flags import config_flag, read_flags
from lljax.errors import exit_cleanly

SEARCHES = {  # --search: the function of lljax.planning.search
    "context": "longest_context",
    "batch": "largest_batch",
    "devices": "fewest_devices",
}


def main(argv: Sequence[str]) -> None:
    """Prints the plan of the run; exits with 1 if it does not fit."""
    logging.basicConfig(level=logging.ERROR, force=True)
    with exit_cleanly():
        values = _flags(["lljax plan", *argv])
        config = values.config
        with config.unlocked():
            config.data.train = config.data.train or ("-",)  # no document is read
        validate(config)
        # Imported here: --help and wrong flags need no jax.
        from lljax.cli import plan_tables

        fits = plan_tables.plan_run(
            config,
            values.device,
            efficiency=values.efficiency,
            host_memory=values.host_gb and int(values.host_gb * 1e9),
            searched=SEARCHES.get(values.search),
        )
    if not fits:
        sys.exit(1)


def _flags(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flag(values, argv)
    flags.DEFINE_string(
        "device",
        None,
        "h100-80g:8 (eight of them), a100-80g, a10-24g, l4, rtx4090, rtx4060-8g, b200, "
        "v5e-8, v5p-8 ...",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "search",
        None,
        list(SEARCHES),
        "Find the longest last stage, or the most rows of it, or the fewest devices, that fit.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "host_gb",
        None,
        "Host memory of a device, GB; by default of a typical node.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "efficiency",
        0.4,
        "Share of the peak arithmetic that the run is assumed to reach.",
        flag_values=values,
    )
    read_flags(values, argv, __doc__ or "", "config", "device")
    return values
