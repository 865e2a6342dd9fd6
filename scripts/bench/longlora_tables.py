"""The results of longlora.py: kept a line a run, shown as tables with the claims they support."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longlora_runs import ATTENTION, BASES, LENGTHS, MAIN, SAMPLES, TASKS, TRAINED, runs
from rich.console import Console
from scipy.stats import ttest_rel

from lljax.evaluation.tables import markdown
from lljax.report import write_report
from lljax.report.charts import spread
from lljax.report.drawing import png
from lljax.report.numbers import short_length

CONSOLE = Console(width=140)


def read_results(out: Path) -> dict[tuple[str, int], dict]:
    """The measures of every finished run, by its name and seed."""
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return {(row["run"], row["seed"]): row["found"] for row in map(json.loads, lines)}


def keep(out: Path, name: str, seed: int, found: dict) -> None:
    """Appends the measures of a run to results.jsonl."""
    # a line at once: another seed's command may write here too
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps({"run": name, "seed": seed, "found": found}) + "\n")


class Results:
    """Values of a measure by run and seed."""

    def __init__(self, out: Path):
        self._rows = read_results(out)

    def names(self) -> list[str]:
        """All runs, in the order of the tables."""
        known = [*BASES.values(), *(run.name for run in runs(1))]
        measured = {name for name, _ in self._rows}
        return [name for name in known if name in measured]

    def values(self, run: str, measure: Callable[[dict], float | None]) -> dict[int, float]:
        """By seed, without the runs that lack this measure."""
        values = {
            seed: measure(row) for (name, seed), row in sorted(self._rows.items()) if name == run
        }
        return {seed: value for seed, value in values.items() if value is not None}


def perplexity_at(length: int) -> Callable[[dict], float | None]:
    return lambda row: row["perplexity"].get(str(length))


def retrieval(lengths: Sequence[int]) -> Callable[[dict], float | None]:
    """Mean over the tasks and lengths."""
    return lambda row: (
        statistics.fmean(row[task][str(n)] for task in TASKS for n in lengths)
        if TASKS[0] in row
        else None
    )


RETRIEVED = retrieval(LENGTHS[-1:])  # at the shorter lengths it is all or nothing
LAST = perplexity_at(LENGTHS[-1])


def cell(values: dict[int, float], decimals: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values.values()):.{decimals}f}"
    return f"{text} ± {statistics.stdev(values.values()):.{decimals}f}" if len(values) > 1 else text


def tables(results: Results) -> list[dict[str, Any]]:
    """Trained weights by attention, perplexity and retrieval by length, and the claims."""
    seeds = max(len(results.values(name, LAST)) for name in results.names())
    about = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    questions = f"mean of {' and '.join(TASKS)}, {SAMPLES} questions each"
    retrieval_title = f"Retrieval, 0 to 100 ({questions}),"
    return [
        trained_table(results, about),
        length_table(results, perplexity_at, 2, "Perplexity", about),
        length_table(results, lambda n: retrieval((n,)), 1, retrieval_title, about),
        {
            "columns": ["claim", "here", "first", "second", "p"],
            "rows": [finding.row(results) for finding in FINDINGS],
            "caption": f"Perplexity, or retrieval, at {LENGTHS[-1]:,} tokens of the two runs that "
            "a claim compares. It holds, or its opposite does, if a t-test over pairs of one seed "
            "has p < 0.05.",
        },
    ]


def trained_table(results: Results, about: str) -> dict[str, Any]:
    return {
        "columns": ["trained", *ATTENTION],
        "rows": [
            [trained, *(cell(results.values(f"{trained}, {kind}", LAST), 2) for kind in ATTENTION)]
            for trained in TRAINED
        ],
        "caption": f"Perplexity at {LENGTHS[-1]:,} tokens under linear RoPE, by the trained "
        "weights and the attention of the training; measured in full attention; "
        f"{about}.",
    }


def length_table(
    results: Results,
    measure_at: Callable[[int], Callable[[dict], float | None]],
    decimals: int,
    title: str,
    about: str,
) -> dict[str, Any]:
    """A measure of every run that was measured at all lengths."""
    rows = []
    for name in results.names():
        if results.values(name, perplexity_at(LENGTHS[0])):
            values = (results.values(name, measure_at(n)) for n in LENGTHS)
            rows.append([name, *(cell(of_seeds, decimals) for of_seeds in values)])
    return {
        "columns": ["run", *map(short_length, LENGTHS)],
        "rows": rows,
        "caption": f"{title} by length in tokens. One thing changed at a time from {MAIN!r}: "
        f"LoRA+embed+norm, rank 16, groups of 1/4; {about}.",
    }


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim that the first of two runs has the lower perplexity, or retrieves more."""

    claim: str
    better: str
    worse: str
    measure: Callable[[dict], float | None] = LAST

    def row(self, results: Results) -> list[str]:
        """claim, verdict, values of both, p. The two runs of a seed are a pair: they read the same
        documents in the same order and start from the same factors.
        """
        a, b = (results.values(name, self.measure) for name in (self.better, self.worse))
        higher_is_better = self.measure is RETRIEVED
        decimals = 1 if higher_is_better else 2
        seeds = [seed for seed in a if seed in b]
        verdict, p = "not measured", math.nan
        if len(seeds) > 1:
            first, second = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
            p = ttest_rel(first, second).pvalue  # NaN if all are the same
            gain = statistics.fmean(y - x for x, y in zip(first, second, strict=True))
            holds = (gain < 0) if higher_is_better else (gain > 0)
            verdict = "no difference seen"
            if p < 0.05:
                verdict = "holds" if holds else "the opposite holds"
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
    Finding("full attention retrieves more than S2", "YaRN, full", MAIN, RETRIEVED),
    Finding("the shift retrieves more than none", MAIN, "YaRN, S2 unshifted", RETRIEVED),
    Finding("S2 retrieves more than a window", MAIN, "YaRN, window", RETRIEVED),
    Finding(
        "a last half in full attention retrieves more than S2 alone",
        "YaRN, S2 then full",
        MAIN,
        RETRIEVED,
    ),
    Finding(
        "growing lengths retrieve more than 4,096 from the start",
        "YaRN, S2 progressive",
        MAIN,
        RETRIEVED,
    ),
    Finding("YaRN retrieves more than NTK", MAIN, "NTK, S2", RETRIEVED),
    Finding("YaRN retrieves more than linear", MAIN, "linear, S2", RETRIEVED),
)


def write(out: Path) -> None:
    """Writes longlora.md and report.html from the results in `out`, and prints the tables."""
    results = Results(out)
    made = tables(results)
    images = []
    for file, title, measure in (
        ("perplexity.png", "Perplexity at 4,096", LAST),
        ("retrieval.png", "Retrieval at 4,096, 0 to 100", RETRIEVED),
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
