"""LongLoRA's tables (arXiv 2309.12307) at the scale of tiny-512, stretched eightfold.

lljax data stdlib --out=data/stdlib.jsonl
python scripts/bench/longlora.py --data=data/stdlib.jsonl --out=runs/longlora --seeds=0,1,2

Compares the trained weights, attention, rank, group size, RoPE and schedule by perplexity and
retrieval at each length, over several seeds. Every run sees as many tokens. The trained weights are
compared under the paper's own RoPE, linear, which breaks this base, so that much is to be learned;
everything else under YaRN, under which the base retrieves from the start, so that retrieval can be
lost and won.

A finished run is not repeated, and seeds may run side by side, each with a command of its own: the
tables are of all runs in --out. They are written as longlora.md and report.html.
"""

import argparse
import dataclasses
import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import jax.numpy as jnp
from longlora_runs import (
    BASE,
    BASES,
    DOCUMENTS,
    LENGTHS,
    SAMPLES,
    TASKS,
    WRITTEN,
    Run,
    config_of,
    runs,
)
from longlora_tables import CONSOLE, keep, read_results, write

from lljax.build import extended_spec, load_base
from lljax.config import Config
from lljax.data.tokens import prepare
from lljax.errors import ConfigError, exit_cleanly
from lljax.evaluation import perplexity, registry
from lljax.evaluation.batched_generation import EvalModel, EvalSettings, score_tasks
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.task import Example, Sources, Task
from lljax.interop.open import end_tokens, open_base, tokenizer_fingerprint
from lljax.models.families import spec_from_hf
from lljax.run import loop


def briefly(task: Task) -> Task:
    """The task with answers of at most WRITTEN tokens."""

    def examples(*args: Any) -> Iterator[Example]:
        for example in task.examples(*args):
            yield dataclasses.replace(example, tokens=min(example.tokens, WRITTEN))

    return dataclasses.replace(task, examples=examples)


class Measurement:
    """Measures models: {perplexity | task: {length: value}}."""

    def __init__(self, config: Config, base: Any, out: Path):
        self.tokenizer, self.out = base.tokenizer(), out
        held_out = prepare(
            config.data,
            self.tokenizer,
            base.config["vocab_size"],
            out / "data",
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
        ).valid
        self.texts = {
            n: perplexity.read("perplexity", held_out, n, max(LENGTHS), DOCUMENTS) for n in LENGTHS
        }
        self.tasks = [briefly(task) for task in registry.find(TASKS, Sources())]
        self.stop = end_tokens(base, self.tokenizer)

    def __call__(self, model: Any, run: Run, seed: int) -> dict[str, dict[int, float]]:
        found = {
            "perplexity": {
                n: perplexity.measure("perplexity", model, self.texts[n], n) for n in run.lengths
            }
        }
        settings = EvalSettings(self.tokenizer, SAMPLES, stop=self.stop, rows=SAMPLES)
        with Predictions(self.out / f"predictions-{seed}.jsonl") as made:
            tasks = self.tasks if run.retrieves else ()
            evaluated = EvalModel(model, run.name, key=run.name)
            for score in score_tasks(evaluated, tasks, run.lengths, settings, made):
                found.setdefault(score.task, {})[score.length] = score.score
        return found


def check_steps(out: Path, steps: int) -> None:
    """Raises ConfigError if `out` has runs of another number of steps."""
    path = out / "steps"
    if path.exists() and int(path.read_text()) != steps:
        raise ConfigError(
            f"--steps={steps} and --out={out}, which holds runs of {path.read_text()} steps: "
            "name another folder"
        )
    path.write_text(str(steps))


def measure(arguments: argparse.Namespace) -> None:
    """Trains and measures the runs that --out does not have yet."""
    out, base = arguments.out, open_base(BASE)
    chosen = [run for run in runs(arguments.steps) if run.name in arguments.runs]
    measurement = Measurement(config_of(Run("", {}), arguments, 0), base, out)
    for kind, name in BASES.items():
        if (name, 0) not in read_results(out):
            context = config_of(Run(name, {"context.rope.type": kind}), arguments, 0).context
            under = (
                spec_from_hf(base.config) if kind == "keep" else extended_spec(base.config, context)
            )
            keep(out, name, 0, measurement(load_base(base, under, jnp.float32), Run(name, {}), 0))
    for seed in map(int, filter(None, arguments.seeds.split(","))):
        workdir = out / f"seed-{seed}"
        for number, run in enumerate(chosen, 1):
            if (run.name, seed) in read_results(out):
                continue
            CONSOLE.print(
                f"seed {seed}, run {number} of {len(chosen)}: {run.name}", highlight=False
            )
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
            model = loop.train(config_of(run, arguments, seed), workdir)
            keep(out, run.name, seed, measurement(model, run, seed))
            del model
            gc.collect()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", required=True, help="JSONL of real text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--steps", type=int, default=20, help="of 4,096 tokens")
    names = [run.name for run in runs(1)]
    parser.add_argument(
        "--runs", nargs="+", metavar="NAME", choices=names, default=names, help="only these"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with exit_cleanly():
        check_steps(arguments.out, arguments.steps)
        measure(arguments)
        write(arguments.out)


if __name__ == "__main__":
    main()
