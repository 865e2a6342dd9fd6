"""What each optimizer keeps for every weight of a 7B model that trains whole; no weight is read.

python scripts/bench_optimizers.py
python scripts/bench_optimizers.py --device=h100-80g --names=q_galore     # and compiles its step;
needs the plan-gpu extra

Llama-2-7B, a row of 2,048 tokens a step in bfloat16, residuals offloaded.
"""

import argparse
import logging
import math

import off_device  # noqa: F401
from rich.console import Console
from rich.table import Table

from lljax.build import mesh_of, placed_model
from lljax.config import READS, default_config, validate
from lljax.errors import exit_cleanly
from lljax.hardware.chips import GB
from lljax.hardware.targets import target
from lljax.models.declare import declared
from lljax.planning import fit
from lljax.planning.plan import Options, plan_stage
from lljax.training.curriculum import stages
from lljax.training.step import take_apart

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def config_of(name: str, rank: int):
    c = default_config()
    c.model.path, c.data.train = "-", ("-",)  # neither is read
    c.train_type, c.optimizer.name, c.memory.offload, c.data.packing = "full", name, True, False
    c.context.length, c.context.schedule, c.context.rope.type = 2048, ((1, 2048, "full"),), "keep"
    if "galore.rank" in READS[name]:
        c.optimizer.galore.rank = rank
    validate(c)
    return c


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--names", default=",".join(READS), help="of optimizers, with commas between them"
    )
    parser.add_argument(
        "--rank", type=int, default=128, help="of the subspaces of galore and q_galore"
    )
    parser.add_argument("--device", help="compile the step for it, as scripts/plan.py does")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    table = Table(title=f"Llama-2-7B, rank {given.rank}; bytes a weight, GB a device")
    for column in ("optimizer", "weights", "state", *(("peak", "host") if given.device else ())):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    with exit_cleanly():
        for name in given.names.split(","):
            config = config_of(name, given.rank)
            mesh = mesh_of(config.mesh)
            model = placed_model(config, LLAMA, mesh)
            count = sum(math.prod(variable.get_value().shape) for _, variable in declared(model))
            state = take_apart(config, model, mesh).state
            cells = [
                f"{fit.bytes_of(tree) / count:.2f}" for tree in (state.trainable, state.optimizer)
            ]
            if given.device:
                need = plan_stage(
                    config, LLAMA, target(given.device), stages(config.context)[0], Options()
                ).need
                cells += [f"{size / GB:.2f}" for size in (need.peak, need.host)]
            table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
