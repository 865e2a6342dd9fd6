"""Bytes that each optimizer keeps for every weight of a 7B model that trains whole.

python scripts/bench/optimizers.py
python scripts/bench/optimizers.py --device=h100-80g --names=q_galore    # and compiles its step

--device needs the plan-gpu or plan-tpu extra. Llama-2-7B, a row of 2,048 tokens a step in bfloat16,
residuals offloaded. No weight is read.
"""

import logging
import math

import common
import without_devices  # noqa: F401

from lljax.build import mesh_of, placed_model
from lljax.config import Config, validate
from lljax.errors import exit_cleanly
from lljax.hardware.targets import target
from lljax.models.declare import declared
from lljax.planning import fit
from lljax.planning.plan import Options, plan_stage
from lljax.training.curriculum import stages
from lljax.training.optimizer import OPTIMIZERS
from lljax.training.state import split


def config_of(name: str, rank: int) -> Config:
    """Full fine-tuning with the optimizer `name`, validated."""
    c = common.plan_config(2048, "full")
    c.train_type, c.optimizer.name, c.memory.offload, c.data.packing = "full", name, True, False
    c.context.rope.type = "keep"
    if "galore.rank" in OPTIMIZERS[name].reads:
        c.optimizer.galore.rank = rank
    validate(c)
    return c


def measure(name: str, rank: int, device: str | None) -> list[str]:
    """Bytes a weight of the weights and of the optimizer; with a device also GB of its step."""
    config = config_of(name, rank)
    mesh = mesh_of(config.mesh)
    model = placed_model(config, common.LLAMA_2_7B, mesh)
    count = sum(math.prod(variable.get_value().shape) for _, variable in declared(model))
    state = split(config, model, mesh).state
    cells = [f"{fit.bytes_of(tree) / count:.2f}" for tree in (state.trainable, state.optimizer)]
    if device:
        stage = stages(config.context)[0]
        need = plan_stage(config, common.LLAMA_2_7B, target(device), stage, Options()).need
        cells += [f"{size / common.GB:.2f}" for size in (need.peak, need.host)]
    return cells


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--names", default=",".join(OPTIMIZERS), help="of optimizers, comma-separated"
    )
    parser.add_argument("--rank", type=int, default=128, help="of the subspaces of (q_)galore")
    parser.add_argument("--device", help="compile the step for it, as `lljax plan` does")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    memory = ("peak", "host") if arguments.device else ()
    table = common.table(
        ("optimizer", "weights", "state", *memory),
        left=("optimizer",),
        title=f"Llama-2-7B, rank {arguments.rank}; bytes a weight, GB a device",
    )
    with exit_cleanly():
        for name in arguments.names.split(","):
            table.add_row(name, *measure(name, arguments.rank, arguments.device))
    common.show(table)


if __name__ == "__main__":
    main()
