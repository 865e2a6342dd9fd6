"""Trains what a config file says; the same command again goes on where it stopped.

python scripts/train.py --config=configs/qwen_32k.py --workdir=runs/qwen_32k [--config.lora.rank=16 ...]
"""

import logging
import re
import sys

from absl import flags
from ml_collections import config_flags

from lljax.errors import ConfigError, exit_cleanly
from lljax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), see configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics and report.")


def read_flags(argv) -> None:
    """Parses the command line; what is wrong with it becomes one line.

    Raises:
      ConfigError: an unknown flag or field, or a value of the wrong type.
    """
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error)
        field = re.search(r'Key "(\w+)"', text)
        nearest = re.search(r'Did you mean "(\w+)"', text)
        if field:
            hint = f": did you mean {nearest[1]!r}?" if nearest else ""
            raise ConfigError(f"there is no config field {field[1]!r}{hint}") from None
        raise ConfigError(text.strip().splitlines()[0]) from None


def main(argv) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("absl", "jax", "orbax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with exit_cleanly():
        read_flags(argv)
        train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    main(sys.argv)
