"""XLA's flags for the training step, by platform and purpose. What both compilers do unasked is not
here.

Nor is xla_gpu_enable_pipelined_host_offloading: it hides the way of a residual back from the host,
  some hundredths of a step, and keeps 15 GiB more of a row of 768k tokens on the device. XLA_FLAGS
  can add it where there is room.

They go with the step's own compilation (`compiler_options` of jax.jit), so that a plan compiles
what a run will run.
"""

import dataclasses
import logging
import os
import re

import jax
from jax.sharding import Sharding


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
        "xla_tpu_enable_async_all_to_all",
        True,
        "tpu",
        "async collectives: Ulysses' exchanges of heads and tokens run beside computing",
        "libtpu; MaxText's run scripts",
    ),
)


def compiler_options(where: Sharding) -> dict:
    """The options of FLAGS for the devices of `where`, which may be descriptions of devices that
    are elsewhere.

    What the user's XLA_FLAGS or LIBTPU_INIT_ARGS name stays as it is there. A flag that this
    compiler no longer has is left out with a warning.
    """
    platform = next(iter(where.device_set)).platform
    users = set(
        re.findall(
            r"--(\w+)",
            os.environ.get("XLA_FLAGS", "") + " " + os.environ.get("LIBTPU_INIT_ARGS", ""),
        )
    )
    options = {
        flag.name: flag.value
        for flag in FLAGS
        if flag.platform == platform and flag.name not in users
    }
    while options and (refused := _refused(options, where)):
        logging.warning("this compiler has no flag %s: left out", refused)
        options = {name: value for name, value in options.items() if name != refused}
    return options


def _refused(options: dict, where: Sharding) -> str | None:
    """The flag that the compiler does not know, tried on an empty program."""
    try:
        jax.jit(lambda: 0, compiler_options=options, out_shardings=where).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if not unknown:
            raise
        return unknown[1]
    return None


def take_gpu_memory() -> None:
    """Has jax take nearly all of a GPU's memory, of which it would leave a quarter unused, and what
    the host can spare for residuals, unless the environment says how much. Before the first device
    is asked for; every process must call it.
    """
    from lljax.hardware.host_memory import set_pinned_limit

    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name of the same
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.97")
    set_pinned_limit()
