"""LongLoRA's tables (arXiv 2309.12307) at the scale of tiny-512, stretched eightfold: what is
trained, under which attention, with which rank, groups, RoPE and schedule; perplexity and retrieval
by length, over several seeds.

python scripts/prepare_data.py stdlib --out=data/stdlib.jsonl
python scripts/bench_longlora.py --data=data/stdlib.jsonl --out=runs/longlora --seeds=0,1,2

Every run sees as many tokens. What is trained is compared under the paper's own RoPE, linear, which
breaks this base, so that much is to be learned; the rest under YaRN, under which it finds things
from the start, so that retrieval can be lost and won.
A run that is done is not repeated, and seeds may run side by side, each with a command of its own:
  the tables are of all that --out holds. They are written as longlora.md and report.html.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
from rich.console import Console
from scipy.stats import ttest_rel

from lljax.attention import shifted
from lljax.build import extended_spec, load_base
from lljax.config import default_config
from lljax.data.tokens import prepare
from lljax.errors import ConfigError, exit_cleanly
from lljax.evaluation import perplexity, registry
from lljax.evaluation.batched_generation import EvalModel, EvalSettings, score_tasks
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.tables import markdown
from lljax.evaluation.task import Sources, Task
from lljax.interop.open import end_tokens, open_base, tokenizer_fingerprint
from lljax.models import spec
from lljax.report.charts import spread
from lljax.report.drawing import png
from lljax.report.numbers import short_length
from lljax.report.page import write_report
from lljax.run import loop

CONSOLE = Console(width=140)
BASE, LENGTHS = "lljax/assets/tiny-512", (512, 1024, 2048, 4096)
TASKS, SAMPLES = ("passkey/tokens", "ruler/niah_single_2_local"), 10
WRITTEN = 16  # new tokens at most; RULER has 128, and the answer stands in the first
DOCUMENTS = 5  # held-out ones of more than 4,096 tokens
TRAINED = {
    "full fine-tuning": None,
    "LoRA": (),
    "LoRA+norm": ("norm",),
    "LoRA+embed": ("embed",),
    "LoRA+embed+norm": ("embed", "norm"),
}
# by the RoPE they are measured under
BASES = {"keep": "base", "linear": "base, linear", "yarn": "base, YaRN"}
ATTENTION = {"full": "full", "S2": "shifted", "S2 unshifted": "shifted", "window": "window"}
MAIN = "YaRN, S2"  # LoRA+embed+norm, rank 16, groups of 1/4


@dataclasses.dataclass(frozen=True)
class Run:
    """changes: fields of the configuration that differ from MAIN's. unshifted: all heads in the
    same groups. lengths: at which it is measured. retrieves: is asked to find things too.
    """

    name: str
    changes: dict
    unshifted: bool = False
    lengths: tuple[int, ...] = LENGTHS
    retrieves: bool = True


def runs(steps: int) -> list[Run]:
    def in_attention(changes, prefix, **how):
        def run(attention, kind):
            return Run(
                f"{prefix}, {attention}",
                changes | {"context.schedule": ((steps, LENGTHS[-1], kind),)},
                attention == "S2 unshifted",
                **how,
            )

        return [run(*pair) for pair in ATTENTION.items()]

    made = in_attention({}, "YaRN")
    made.append(
        Run(
            "YaRN, S2 then full",
            {"context.schedule": ((steps // 2, 4096, "shifted"), (steps, 4096, "full"))},
        )
    )
    # A quarter of the tokens at 1,024, a quarter at 2,048, half at 4,096.
    ends = (steps, steps + steps // 2, 2 * steps)
    made.append(
        Run(
            "YaRN, S2 progressive",
            {"context.schedule": tuple(zip(ends, LENGTHS[1:], 3 * ("shifted",)))},
        )
    )
    made += [
        Run(f"YaRN, S2, rank {rank}", {"lora.rank": rank, "lora.alpha": 2.0 * rank})
        for rank in (8, 32, 64)
    ]
    made += [
        Run(f"YaRN, S2, groups of 1/{part}", {"context.group": 1 / part}) for part in (2, 6, 8)
    ]
    made += [
        Run(f"{name}, S2", {"context.rope.type": type})
        for name, type in (("NTK", "dynamic"), ("linear", "linear"))
    ]
    for trained, roles in TRAINED.items():
        # A third of LoRA's learning rate: full fine-tuning breaks with more.
        full = {"train_type": "full", "optimizer.learning_rate": 5e-4}
        what = {"lora.also_train": roles} if roles is not None else full
        made += in_attention(
            what | {"context.rope.type": "linear"}, trained, lengths=LENGTHS[-1:], retrieves=False
        )
    return made


def config_of(run: Run, arguments, seed: int):
    c = default_config()
    c.seed = seed
    c.model.path, c.model.dtype, c.memory.remat = BASE, "float32", "none"
    c.context.length, c.context.rope.type, c.context.window, c.context.anchors = (
        4096,
        "yarn",
        1024,
        0,
    )
    c.context.schedule = ((arguments.steps, 4096, "shifted"),)
    c.lora.rank, c.lora.alpha, c.lora.targets = 16, 32.0, ("all-linear",)
    c.data.train, c.data.valid_fraction = (arguments.data,), 0.03
    c.optimizer.learning_rate, c.optimizer.learning_rate_ratio.embed, c.optimizer.warmup_steps = (
        1.5e-3,
        0.2,
        4,
    )
    c.training.eval_rows = 1  # what is measured is measured below
    c.update_from_flattened_dict(run.changes)
    return c


@contextlib.contextmanager
def attention_of(run: Run):
    """LongLoRA's ablation of the shift is no option of lljax: it is the same cost for less."""
    shifted_parts = shifted.parts
    unmoved = lambda N, K, half: (
        (heads, shared, 0) for heads, shared, _ in shifted_parts(N, K, half)
    )
    with (
        mock.patch.object(shifted, "parts", unmoved) if run.unshifted else contextlib.nullcontext()
    ):
        yield


def briefly(task: Task) -> Task:
    def examples(*how):
        for example in task.examples(*how):
            yield dataclasses.replace(example, tokens=min(example.tokens, WRITTEN))

    return dataclasses.replace(task, examples=examples)


class Ruler:
    """Measures models: {perplexity | task: {length: value}}."""

    def __init__(self, config, base, out: Path):
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

    def __call__(self, model, run: Run, seed: int) -> dict[str, dict[int, float]]:
        found = {
            "perplexity": {
                n: perplexity.measure("perplexity", model, self.texts[n], n) for n in run.lengths
            }
        }
        settings = EvalSettings(self.tokenizer, SAMPLES, stop=self.stop, rows=SAMPLES)
        with Predictions(self.out / f"predictions-{seed}.jsonl") as made:
            for score in score_tasks(
                EvalModel(model, run.name, key=run.name),
                self.tasks if run.retrieves else (),
                run.lengths,
                settings,
                made,
            ):
                found.setdefault(score.task, {})[score.length] = score.score
        return found


# ---------------------------------------------------------------- results
def read_results(out: Path) -> dict[tuple[str, int], dict]:
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return {(row["run"], row["seed"]): row["found"] for row in map(json.loads, lines)}


def keep(out: Path, name: str, seed: int, found: dict) -> None:
    # a line at once: another seed's command may write here too
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps({"run": name, "seed": seed, "found": found}) + "\n")


class Results:
    """Values of a measure by run and seed."""

    def __init__(self, out: Path):
        self._rows = read_results(out)

    def names(self) -> list[str]:
        """Of all runs, in the order of the tables."""
        known = [*BASES.values(), *(run.name for run in runs(1))]
        return [name for name in known if any(name == each for each, _ in self._rows)]

    def values(self, run: str, measure: Callable[[dict], float | None]) -> dict[int, float]:
        """By seed; nothing of runs of which this was not measured."""
        found = {
            seed: measure(found)
            for (name, seed), found in sorted(self._rows.items())
            if name == run
        }
        return {seed: value for seed, value in found.items() if value is not None}


def perplexity_at(length: int) -> Callable[[dict], float | None]:
    return lambda found: found["perplexity"].get(str(length))


def retrieval(lengths) -> Callable[[dict], float | None]:
    """Mean over the tasks and lengths."""
    return lambda found: (
        statistics.fmean(found[task][str(n)] for task in TASKS for n in lengths)
        if TASKS[0] in found
        else None
    )


FOUND = retrieval(LENGTHS[-1:])  # where it is not all or nothing
LAST = perplexity_at(LENGTHS[-1])


def cell(values: dict[int, float], decimals: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values.values()):.{decimals}f}"
    return f"{text} ± {statistics.stdev(values.values()):.{decimals}f}" if len(values) > 1 else text


def tables(results: Results) -> list[dict]:
    seeds = max(len(results.values(name, LAST)) for name in results.names())
    about = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    made = [
        {
            "columns": ["trained", *ATTENTION],
            "rows": [
                [
                    trained,
                    *(
                        cell(results.values(f"{trained}, {attention}", LAST), 2)
                        for attention in ATTENTION
                    ),
                ]
                for trained in TRAINED
            ],
            "caption": f"Perplexity at {LENGTHS[-1]:,} tokens under linear RoPE, by what was trained and the attention it was "
            f"trained in; measured in full attention; {about}.",
        }
    ]
    everywhere = [
        name for name in results.names() if results.values(name, perplexity_at(LENGTHS[0]))
    ]
    for measure_at, decimals, what in (
        (perplexity_at, 2, "Perplexity"),
        (
            lambda n: retrieval((n,)),
            1,
            f"Retrieval, 0 to 100 (mean of {' and '.join(TASKS)}, {SAMPLES} questions each),",
        ),
    ):
        made.append(
            {
                "columns": ["run", *map(short_length, LENGTHS)],
                "rows": [
                    [name, *(cell(results.values(name, measure_at(n)), decimals) for n in LENGTHS)]
                    for name in everywhere
                ],
                "caption": f"{what} by length in tokens. One thing changed at a time from {MAIN!r}: LoRA+embed+norm, rank "
                f"16, groups of 1/4; {about}.",
            }
        )
    made.append(
        {
            "columns": ["claim", "here", "of the one", "of the other", "p"],
            "rows": [finding.row(results) for finding in FINDINGS],
            "caption": f"Perplexity, or retrieval, at {LENGTHS[-1]:,} tokens of the two runs that a claim "
            "compares. It holds, or its opposite does, where a t-test over pairs of one seed has p < 0.05.",
        }
    )
    return made


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim that the first of two runs has the lower perplexity, or retrieves more."""

    claim: str
    better: str
    worse: str
    measure: Callable[[dict], float | None] = LAST

    def row(self, results: Results) -> list[str]:
        """claim, verdict, values of both, p. A seed is a pair: it is the same order of documents
        and the same first factors.
        """
        a, b = (results.values(name, self.measure) for name in (self.better, self.worse))
        decimals = 1 if self.measure is FOUND else 2
        verdict, p = "not measured", math.nan
        if len(pairs := [(a[seed], b[seed]) for seed in a if seed in b]) > 1:
            p = ttest_rel(*zip(*pairs)).pvalue  # NaN where all are the same
            gain = statistics.fmean(y - x for x, y in pairs) * (-1 if self.measure is FOUND else 1)
            verdict = (
                ("holds" if gain > 0 else "the opposite holds")
                if p < 0.05
                else "no difference seen"
            )
        return [
            self.claim,
            verdict,
            cell(a, decimals),
            cell(b, decimals),
            "–" if math.isnan(p) else f"{p:.3f}",
        ]


BOTH = "LoRA+embed+norm"
FINDINGS = (
    Finding("trained embeddings help LoRA", "LoRA+embed, S2", "LoRA, S2"),
    Finding("trained norms help LoRA", "LoRA+norm, S2", "LoRA, S2"),
    Finding("norms help beside embeddings", f"{BOTH}, S2", "LoRA+embed, S2"),
    Finding(
        "full fine-tuning is better than LoRA+embed+norm", "full fine-tuning, S2", f"{BOTH}, S2"
    ),
    Finding("full attention is better than S2 (linear)", f"{BOTH}, full", f"{BOTH}, S2"),
    Finding("the shift helps (linear)", f"{BOTH}, S2", f"{BOTH}, S2 unshifted"),
    Finding("S2 is better than a window (linear)", f"{BOTH}, S2", f"{BOTH}, window"),
    Finding("full attention is better than S2 (YaRN)", "YaRN, full", MAIN),
    Finding("the shift helps (YaRN)", MAIN, "YaRN, S2 unshifted"),
    Finding("S2 is better than a window (YaRN)", MAIN, "YaRN, window"),
    Finding("a last half in full attention is better than S2 alone", "YaRN, S2 then full", MAIN),
    Finding("growing lengths are better than 4,096 from the start", "YaRN, S2 progressive", MAIN),
    Finding("rank 64 is better than rank 8", "YaRN, S2, rank 64", "YaRN, S2, rank 8"),
    Finding(
        "groups of 1/2 are better than of 1/8", "YaRN, S2, groups of 1/2", "YaRN, S2, groups of 1/8"
    ),
    Finding("YaRN is better than NTK", MAIN, "NTK, S2"),
    Finding("YaRN is better than linear", MAIN, "linear, S2"),
    Finding("full attention retrieves more than S2", "YaRN, full", MAIN, FOUND),
    Finding("the shift retrieves more than none", MAIN, "YaRN, S2 unshifted", FOUND),
    Finding("S2 retrieves more than a window", MAIN, "YaRN, window", FOUND),
    Finding(
        "a last half in full attention retrieves more than S2 alone",
        "YaRN, S2 then full",
        MAIN,
        FOUND,
    ),
    Finding(
        "growing lengths retrieve more than 4,096 from the start",
        "YaRN, S2 progressive",
        MAIN,
        FOUND,
    ),
    Finding("YaRN retrieves more than NTK", MAIN, "NTK, S2", FOUND),
    Finding("YaRN retrieves more than linear", MAIN, "linear, S2", FOUND),
)


def write(out: Path) -> None:
    results = Results(out)
    made = tables(results)
    images = []
    for file, title, measure in (
        ("perplexity.png", "Perplexity at 4,096", LAST),
        ("retrieval.png", "Retrieval at 4,096, 0 to 100", FOUND),
    ):
        values = {
            name: list(results.values(name, measure).values())
            for name in results.names()
            if name != BASES["keep"]
        }
        (out / file).write_bytes(png(spread(title, values)))
        images.append({"file": file, "title": title})
    (out / "evaluation.json").write_text(
        json.dumps({"tables": made, "images": images, "scores": []}, indent=2)
    )
    text = "\n".join(map(markdown, made))
    (out / "longlora.md").write_text(text)
    CONSOLE.print(text, highlight=False, markup=False)
    CONSOLE.print(f"Report: {write_report(out)}", highlight=False)


def check_steps(out: Path, steps: int) -> None:
    """Raises ConfigError where `out` holds runs of another number of steps."""
    path = out / "steps"
    if path.exists() and int(path.read_text()) != steps:
        raise ConfigError(
            f"--steps={steps} and --out={out}, which holds runs of {path.read_text()} steps: name another folder"
        )
    path.write_text(str(steps))


def measure(arguments) -> None:
    """Trains and measures what --out does not hold yet."""
    out, base = arguments.out, open_base(BASE)
    chosen = [run for run in runs(arguments.steps) if run.name in arguments.runs]
    ruler = Ruler(config_of(Run("", {}), arguments, 0), base, out)
    for kind, name in BASES.items():
        if (name, 0) not in read_results(out):
            context = config_of(Run(name, {"context.rope.type": kind}), arguments, 0).context
            under = (
                spec.from_hf(base.config) if kind == "keep" else extended_spec(base.config, context)
            )
            keep(out, name, 0, ruler(load_base(base, under, jnp.float32), Run(name, {}), 0))
    for seed in map(int, filter(None, arguments.seeds.split(","))):
        workdir = out / f"seed-{seed}"
        for number, run in enumerate(chosen, 1):
            if (run.name, seed) in read_results(out):
                continue
            CONSOLE.print(
                f"seed {seed}, run {number} of {len(chosen)}: {run.name}", highlight=False
            )
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
            with attention_of(run):
                model = loop.train(config_of(run, arguments, seed), workdir)
            keep(out, run.name, seed, ruler(model, run, seed))
            del model
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
