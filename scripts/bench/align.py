"""What a preference or policy step costs: a row that shares its prompt against rows that repeat it,
and beside TRL.

python scripts/bench/align.py --measure=shared
python scripts/bench/align.py --measure=shared --prompt=4096 --answer=128 --rounds=3
python scripts/bench/align.py --measure=trl --model=models/smollm2.gguf --rounds=2

shared: one step of DPO with two answers and of GRPO with eight, gradient included, of one model in
both layouts, with the same loss. FLOPs are of the matrix products in the compiled programs, loops
counted as often as they run; the loops over blocks of attention follow the mask, and run as often
as pairs of blocks are visited. With --rounds both are run too, in turns in one process.

trl: steps of DPO beside TRL's DPOTrainer, one process each in turns (align_trl.py). A GGUF file is
first written as a folder in float32, which both read.
"""

import argparse
import json

import align_trl
import common

from lljax.errors import exit_cleanly


def read_arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--measure", choices=("shared", "trl"), required=True)
    parser.add_argument(
        "--model", default="lljax/assets/tiny-512", help="a GGUF file, a folder, or a hub id"
    )
    parser.add_argument("--prompt", type=int, help="tokens; 16,384, or 2,048 beside TRL")
    parser.add_argument("--answer", type=int, help="tokens; 512, or 64 beside TRL")
    parser.add_argument("--rounds", type=int, default=0, help="timed turns; beside TRL at least 1")
    parser.add_argument("--steps", type=int, default=2, help="trl: timed steps a process")
    parser.add_argument(
        "--system",
        choices=tuple(align_trl.SYSTEMS),
        help="trl: measure one, in this process, and print JSON",
    )
    return parser.parse_args()


def main() -> None:
    a = read_arguments()
    prompt = a.prompt or {"shared": 16_384, "trl": 2048}[a.measure]
    answer = a.answer or {"shared": 512, "trl": 64}[a.measure]
    with exit_cleanly():
        if a.measure == "shared":
            from align_shared import shared  # imports jax, which a peer's process must not pay for

            shared(a.model, prompt, answer, a.rounds)
        elif a.system:
            print(json.dumps(align_trl.measure(a.system, a.model, prompt, answer, a.steps)))
        else:
            align_trl.compare(__file__, a.model, prompt, answer, a.steps, max(a.rounds, 1))


if __name__ == "__main__":
    main()
