"""What scripts do before their work: flags of those that take a config file, and the memory of a GPU."""

import os
import re

from absl import flags

from lljax.errors import ConfigError
from lljax.host_memory import set_pinned_limit


def read_flags(argv, *required: str) -> None:
    """Parses the command line; what is wrong with it becomes one line.

    Raises:
      ConfigError: an unknown flag or field, a value of the wrong type, or a required flag that is missing.
    """
    flags.mark_flags_as_required(required)
    try:
        flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error)
        field = re.search(r'''Key "(\w+)"|^\W*(\w+)\W+n?Did you mean''', text)
        nearest = re.search(r'Did you mean "(\w+)"', text)
        if field:
            hint = f": did you mean {nearest[1]!r}?" if nearest else ""
            raise ConfigError(f"there is no config field {(field[1] or field[2])!r}{hint}") from None
        raise ConfigError(text.strip().splitlines()[0]) from None


def take_gpu_memory() -> None:
    """Has jax take nearly all of a GPU's memory, of which it would leave a quarter unused, and what the host can spare for
    residuals, unless the environment says how much. Before the first device is asked for; every process must call it."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:       # the older name of the same
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.97")
    set_pinned_limit()
