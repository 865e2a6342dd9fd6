"""Trains what a config file says; the same command again goes on where it stopped.

python scripts/train.py --config=configs/qwen_32k.py --workdir=runs/qwen_32k [--config.lora.rank=16 ...] [--profile_steps=20:23]
"""

import logging
import sys

import leaves_on_sigterm  # noqa: F401
from absl import flags
from ml_collections import config_flags

from lljax import distributed
from lljax.command_line import read_flags, take_gpu_memory
from lljax.errors import exit_cleanly
from lljax.evaluation.during import examiner
from lljax.training.loop import train
from lljax.training.profile import read_steps

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), see configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints, metrics and report.")
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "first:stop, steps to trace into WORKDIR/profile for TensorBoard.")


def main(argv) -> None:
    # force: a library that was imported has set up logging already, for warnings alone.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("jax", "orbax", "httpx", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)    # Orbax, of a save that failed: lljax says it in a line
    with distributed.session(), exit_cleanly():
        read_flags(argv, "config", "workdir")
        distributed.start(CONFIG.value.mesh.peer_timeout)
        take_gpu_memory()
        train(CONFIG.value, WORKDIR.value, profile_steps=read_steps(PROFILE_STEPS.value), examiner=examiner)


if __name__ == "__main__":
    main(sys.argv)
