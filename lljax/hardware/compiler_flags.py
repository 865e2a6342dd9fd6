"""XLA's flags for the training step, by platform and purpose, except those that both compilers set
by default.

xla_gpu_enable_pipelined_host_offloading is left out: it hides the transfer of a residual back from
the host, some hundredths of a step, and keeps 15 GiB more of a row of 768k tokens on the device.
XLA_FLAGS can add it if there is room.

The flags go with the step's own compilation (`compiler_options` of jax.jit), so that a plan
compiles the same program as a run.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable

import jax
from jax.sharding import Sharding

from lljax.hardware.host_memory import set_pinned_limit


@dataclasses.dataclass(frozen=True)
class Flag:
    """One XLA flag. platform: gpu | tpu. source: who documents or uses it."""

    name: str
    value: bool | int | str
    platform: str
    purpose: str
    source: str


FLAGS = (
    Flag(
        name="xla_tpu_enable_async_all_to_all",
        value=True,
        platform="tpu",
        purpose="overlap Ulysses' exchanges of heads and tokens with compute",
        source="libtpu; MaxText's run scripts",
    ),
)


def compiler_options(sharding: Sharding) -> dict[str, bool | int | str]:
    """The options of FLAGS for the devices of `sharding`, present or described only.

    A flag that the user sets in XLA_FLAGS or LIBTPU_INIT_ARGS is left to the user. A flag that this
    compiler no longer has is left out with a warning.
    """
    platform = next(iter(sharding.device_set)).platform
    given = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    users = set(re.findall(r"--(\w+)", given))
    options = {
        flag.name: flag.value
        for flag in FLAGS
        if flag.platform == platform and flag.name not in users
    }
    while options and (unknown := _unknown_flag(options, sharding)):
        logging.warning("this compiler has no flag %s: left out", unknown)
        options = {name: value for name, value in options.items() if name != unknown}
    return options


def _unknown_flag(options: dict[str, bool | int | str], sharding: Sharding) -> str | None:
    """A flag that the compiler does not know, found by compiling an empty program."""
    try:
        jax.jit(lambda: 0, compiler_options=options, out_shardings=sharding).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if not unknown:
            raise
        return unknown[1]
    return None


def take_gpu_memory(processes: Callable[[], int]) -> None:
    """Lets jax allocate 97% of a GPU's memory (its default is 75%) and most of the host's for
    offloaded residuals, unless the environment sets either. Every process must call it before jax
    starts.

    processes: counts the run's processes on this host.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the variable's older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.97")
    set_pinned_limit(processes)
