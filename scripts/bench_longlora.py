"""LongLoRA's tables (arXiv 2309.12307) at the scale of tiny-512, stretched eightfold: what is trained, under which attention,
with which rank, groups, RoPE and schedule; perplexity and retrieval by length, over several seeds.

python scripts/prepare_data.py stdlib --out=data/stdlib.jsonl
python scripts/bench_longlora.py --data=data/stdlib.jsonl --out=runs/longlora --seeds=0,1

Every run sees as many tokens. A run that is done is not repeated, and seeds may run side by side, each with a command of its
own: the tables are of all that --out holds. They are written as longlora.md and report.html.
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

from lljax.attention import shifted
from lljax.build import extended_spec, load_base
from lljax.config import default_config
from lljax.data.tokens import prepare
from lljax.errors import ConfigError, exit_cleanly
from lljax.evaluation import perplexity, registry, spread
from lljax.evaluation.answer import Asking, answer
from lljax.evaluation.candidates import STRETCHED
from lljax.evaluation.results import Predictions, markdown
from lljax.evaluation.task import Sources, Task
from lljax.interop.base import end_tokens, open_base, tokenizer_fingerprint
from lljax.models import spec
from lljax.training import loop
from lljax.training.charts import short_length
from lljax.training.report import write_report

CONSOLE = Console(width=140)
BASE, LENGTHS = "lljax/assets/tiny-512", (512, 1024, 2048, 4096)
TASKS, SAMPLES = ("passkey/tokens", "ruler/niah_single_2_local"), 6
WRITTEN = 16                                 # new tokens at most; RULER has 128, and the answer stands in the first
DOCUMENTS = 5                                # held-out ones of more than 4,096 tokens
TRAINED = {"full fine-tuning": None, "LoRA": (), "LoRA+norm": ("norm",), "LoRA+embed": ("embed",),
           "LoRA+embed+norm": ("embed", "norm")}
ATTENTION = ("full", "S2", "S2 unshifted", "window")
MAIN = "LoRA+embed+norm, S2"


@dataclasses.dataclass(frozen=True)
class Run:
    """changes: fields of the configuration that differ from MAIN's. unshifted: all heads in the same groups."""

    name: str
    changes: dict
    unshifted: bool = False


def runs(steps: int) -> list[Run]:
    kinds = {"full": "full", "S2": "shifted", "S2 unshifted": "shifted", "window": "window"}
    made = []
    for trained, roles in TRAINED.items():
        for attention, kind in kinds.items():
            what = {"lora.also_train": roles} if roles is not None else \
                {"train_type": "full", "optimizer.learning_rate": 5e-4}      # a third of LoRA's, which breaks it
            schedule = {"context.schedule": ((steps, 4096, kind),)}
            made.append(Run(f"{trained}, {attention}", what | schedule, attention == "S2 unshifted"))
    made += [Run(f"rank {rank}", {"lora.rank": rank, "lora.alpha": 2.0 * rank}) for rank in (8, 32, 64)]
    made += [Run(f"groups of 1/{part}", {"context.group": 1 / part}) for part in (2, 6, 8)]
    made += [Run(f"RoPE {type}", {"context.rope.type": type}) for type in ("linear", "dynamic")]
    # A quarter of the tokens at 1,024, a quarter at 2,048, half at 4,096.
    ends = (steps, steps + steps // 2, 2 * steps)
    made.append(Run("progressive", {"context.schedule": tuple(zip(ends, (1024, 2048, 4096), 3 * ("shifted",)))}))
    made.append(Run("S2, then full", {"context.schedule": ((steps // 2, 4096, "shifted"), (steps, 4096, "full"))}))
    return made


def config_of(run: Run, arguments, seed: int):
    c = default_config()
    c.seed = seed
    c.model.path, c.model.dtype, c.memory.remat = BASE, "float32", "none"
    c.context.length, c.context.rope.type, c.context.window, c.context.anchors = 4096, "yarn", 1024, 0
    c.context.schedule = ((arguments.steps, 4096, "shifted"),)
    c.lora.rank, c.lora.alpha, c.lora.targets = 16, 32.0, ("all-linear",)
    c.data.train, c.data.valid_fraction = (arguments.data,), 0.03
    c.optimizer.learning_rate, c.optimizer.learning_rate_ratio.embed, c.optimizer.warmup_steps = 1.5e-3, 0.2, 4
    c.training.eval_rows = 1                 # what is measured is measured below
    c.update_from_flattened_dict(run.changes)
    return c


@contextlib.contextmanager
def attention_of(run: Run):
    """LongLoRA's ablation of the shift is no option of lljax: it is the same cost for less."""
    shifted_parts = shifted.parts
    unmoved = lambda N, K, half: ((heads, shared, 0) for heads, shared, _ in shifted_parts(N, K, half))
    with mock.patch.object(shifted, "parts", unmoved) if run.unshifted else contextlib.nullcontext():
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
        held_out = prepare(config.data, self.tokenizer, base.config["vocab_size"], out / "data",
                           tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer)).valid
        self.texts = {n: perplexity.read("perplexity", held_out, n, max(LENGTHS), DOCUMENTS) for n in LENGTHS}
        self.tasks = [briefly(task) for task in registry.find(TASKS, Sources())]
        self.stop = end_tokens(base, self.tokenizer)

    def __call__(self, model, name: str, seed: int) -> dict[str, dict[int, float]]:
        found = {"perplexity": {n: perplexity.measure("perplexity", model, text, n) for n, text in self.texts.items()}}
        asking = Asking(self.tokenizer, SAMPLES, stop=self.stop, rows=SAMPLES)
        with Predictions(self.out / f"predictions-{seed}.jsonl") as made:
            for score in answer(model, name, name, self.tasks, LENGTHS, asking, made):
                found.setdefault(score.task, {})[score.length] = score.score
        return found


# ---------------------------------------------------------------- results
def read_results(out: Path) -> dict[tuple[str, int], dict]:
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return {(row["run"], row["seed"]): row["found"] for row in map(json.loads, lines)}


def keep(out: Path, name: str, seed: int, found: dict) -> None:
    with open(out / "results.jsonl", "a") as file:       # a line at once: another seed's command may write here too
        file.write(json.dumps({"run": name, "seed": seed, "found": found}) + "\n")


class Results:
    """Values of a measure by run: a list with one for each seed."""

    def __init__(self, out: Path):
        self._rows = read_results(out)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self._rows))

    def values(self, run: str, measure: Callable[[dict], float]) -> list[float]:
        return [measure(found) for (name, _), found in sorted(self._rows.items(), key=lambda item: item[0][1]) if name == run]


def perplexity_at(length: int) -> Callable[[dict], float]:
    return lambda found: found["perplexity"][str(length)]


def retrieval(lengths) -> Callable[[dict], float]:
    """Mean over the tasks and lengths that have a score."""
    def measure(found):
        scores = [found[task][str(n)] for task in TASKS for n in lengths]
        return statistics.fmean(score for score in scores if not math.isnan(score))
    return measure


BEYOND = retrieval(LENGTHS[1:])
LAST = perplexity_at(LENGTHS[-1])


def cell(values: list[float], decimals: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def tables(results: Results) -> list[dict]:
    seeds = max(len(results.values(name, LAST)) for name in results.names())
    spread_words = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    made = []
    for measure, decimals, what in ((LAST, 2, "Perplexity at 4,096"), (BEYOND, 1, "Retrieval at 1,024 to 4,096, 0 to 100")):
        rows = [[trained, *(cell(results.values(f"{trained}, {attention}", measure), decimals) for attention in ATTENTION)]
                for trained in TRAINED]
        made.append({"columns": ["trained", *ATTENTION], "rows": rows,
                     "caption": f"{what}, by what was trained and the attention it was trained in ({spread_words}); measured "
                                "in full attention."})
    rest = [name for name in results.names() if ", " not in name.replace("S2, then", "")]
    listed = [name for name in results.names() if name.startswith("base")] + \
        [MAIN, "LoRA+embed+norm, full", *(name for name in rest if not name.startswith("base"))]
    for measure_at, decimals, what in ((perplexity_at, 2, "Perplexity"), (lambda n: retrieval((n,)), 1, "Retrieval")):
        made.append({"columns": ["run", *map(short_length, LENGTHS)],
                     "rows": [[name, *(cell(results.values(name, measure_at(n)), decimals) for n in LENGTHS)]
                              for name in dict.fromkeys(listed)],
                     "caption": f"{what} by length in tokens: one thing changed at a time from {MAIN} (rank 16, groups of 1/4, "
                                "YaRN)." + (f" Retrieval is the mean of {', '.join(TASKS)}." if what == "Retrieval" else "")})
    return made


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim that the first of two runs has a lower (of retrieval: higher) value than the second."""

    text: str
    better: str
    worse: str
    measure: Callable[[dict], float] = LAST
    higher: bool = False

    def verdict(self, results: Results) -> str:
        """Holds where the difference exceeds twice its standard error over seeds."""
        a, b = (results.values(name, self.measure) for name in (self.better, self.worse))
        if min(len(a), len(b)) < 2:
            return f"- {self.text}: not measured over several seeds."
        gain = (statistics.fmean(b) - statistics.fmean(a)) * (-1 if self.higher else 1)
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        word = "holds" if gain > 2 * error else "the opposite holds" if gain < -2 * error else "no difference seen"
        decimals = 1 if self.higher else 2
        return f"- {self.text}: **{word}** ({cell(a, decimals)} against {cell(b, decimals)})."


def findings() -> list[Finding]:
    both = "LoRA+embed+norm"
    return [
        Finding("Embeddings beside LoRA lower the perplexity (S2)", "LoRA+embed, S2", "LoRA, S2"),
        Finding("Norms beside LoRA lower it (S2)", "LoRA+norm, S2", "LoRA, S2"),
        Finding("Both together are better than embeddings alone (S2)", f"{both}, S2", "LoRA+embed, S2"),
        Finding("Full fine-tuning is better than LoRA+embed+norm (S2)", "full fine-tuning, S2", f"{both}, S2"),
        Finding("The shift lowers the perplexity", f"{both}, S2", f"{both}, S2 unshifted"),
        Finding("Training in full attention gives a lower perplexity than in S2", f"{both}, full", f"{both}, S2"),
        Finding("S2 gives a lower perplexity than a window of the same cost", f"{both}, S2", f"{both}, window"),
        Finding("Rank 64 is better than rank 8", "rank 64", "rank 8"),
        Finding("Groups of 1/2 are better than groups of 1/8", "groups of 1/2", "groups of 1/8"),
        Finding("YaRN is better than linear interpolation", f"{both}, S2", "RoPE linear"),
        Finding("The progressive schedule is better than 4,096 from the start", "progressive", f"{both}, S2"),
        Finding("S2 and then full attention is better than S2 alone", "S2, then full", f"{both}, S2"),
        Finding("Full attention retrieves more than S2", f"{both}, full", f"{both}, S2", BEYOND, True),
        Finding("The shift retrieves more than none", f"{both}, S2", f"{both}, S2 unshifted", BEYOND, True),
        Finding("S2 and then full attention retrieves more than S2 alone", "S2, then full", f"{both}, S2", BEYOND, True),
        Finding("YaRN retrieves more than linear interpolation", f"{both}, S2", "RoPE linear", BEYOND, True)]


def write(out: Path) -> None:
    results = Results(out)
    made = tables(results)
    images = []
    for file, title, measure in (("perplexity.png", "Perplexity at 4,096", LAST),
                                 ("retrieval.png", "Retrieval at 1,024 to 4,096, 0 to 100", BEYOND)):
        values = {name: results.values(name, measure) for name in results.names() if name != "base"}
        (out / file).write_bytes(spread.png(title, values))
        images.append({"file": file, "title": title})
    (out / "evaluation.json").write_text(json.dumps({"tables": made, "images": images, "scores": []}, indent=2))
    text = "\n".join(map(markdown, made)) + "\n" + "\n".join(each.verdict(results) for each in findings()) + "\n"
    (out / "longlora.md").write_text(text)
    CONSOLE.print(text, highlight=False, markup=False)
    CONSOLE.print(f"Report: {write_report(out)}", highlight=False)


def check_steps(out: Path, steps: int) -> None:
    """Raises ConfigError where `out` holds runs of another number of steps."""
    path = out / "steps"
    if path.exists() and int(path.read_text()) != steps:
        raise ConfigError(f"--steps={steps} and --out={out}, which holds runs of {path.read_text()} steps: name another folder")
    path.write_text(str(steps))


def measure(arguments) -> None:
    """Trains and measures what --out does not hold yet."""
    out, base = arguments.out, open_base(BASE)
    chosen = [run for run in runs(arguments.steps) if arguments.runs in run.name]
    plain = config_of(Run("", {}), arguments, 0)
    ruler = Ruler(plain, base, out)
    for name, under in (("base", spec.from_hf(base.config)), (STRETCHED, extended_spec(base.config, plain.context))):
        if (name, 0) not in read_results(out):
            keep(out, name, 0, ruler(load_base(base, under, jnp.float32), name, 0))
    for seed in map(int, filter(None, arguments.seeds.split(","))):
        workdir = out / f"seed-{seed}"
        for number, run in enumerate(chosen, 1):
            if (run.name, seed) in read_results(out):
                continue
            CONSOLE.print(f"seed {seed}, run {number} of {len(chosen)}: {run.name}", highlight=False)
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
            with attention_of(run):
                model = loop.train(config_of(run, arguments, seed), workdir)
            keep(out, run.name, seed, ruler(model, run.name, seed))
            del model
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL of real text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--steps", type=int, default=20, help="of 4,096 tokens")
    parser.add_argument("--runs", default="", help="only those whose name holds this")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with exit_cleanly():
        check_steps(arguments.out, arguments.steps)
        measure(arguments)
        write(arguments.out)


if __name__ == "__main__":
    main()
