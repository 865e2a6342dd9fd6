"""The top of the page: the effect of training, and the run in numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lljax.report.content import Fact, Section
from lljax.report.numbers import (
    column,
    compact,
    duration,
    finite_column,
    four_figures,
    to_float,
)
from lljax.report.run_files import RunFiles
from lljax.report.tables import clipped

MOST_FINDINGS = 8


def finding(files: RunFiles) -> Section:
    """The effect of training: the context, then perplexity and retrieval at the longest length.

    Scores come from evaluation.json, which compares with the base model; without it, from the
    evaluations during training, first against last.
    """
    section = Section()
    findings = files.evaluation.get("finding")
    if isinstance(findings, list):
        section.extend(section.facts, "evaluation.json", _fact_of_finding, findings[:MOST_FINDINGS])
    if not section.facts:
        section.facts += section.guarded("metrics.jsonl", _during_training, files.evaluations) or []
    context = section.guarded("run.json", _context, files)
    if context and (section.facts or context.before):
        section.facts.insert(0, context)
    return section


def _context(files: RunFiles) -> Fact | None:
    length, before = files.context.get("length"), files.run.get("base_length")
    if type(length) is not int:
        return None
    return Fact(
        label="Context in tokens",
        value=f"{length:,}",
        before=f"{before:,}" if type(before) is int else None,
        note="base \u2192 trained" if type(before) is int else "trained",
    )


def _fact_of_finding(row: dict[str, Any]) -> Fact:
    label, after, note, between = (
        clipped(row.get(name, "")) for name in ("what", "after", "note", "between")
    )
    before = row["before"]
    compared = "trained" if before is None else between or "base \u2192 trained"
    return Fact(
        label=label,
        value=after,
        before=None if before is None else clipped(before),
        note=", ".join(filter(None, [compared, note])),
    )


def _during_training(evaluations: list[dict]) -> list[Fact]:
    """Perplexity and the scores of tasks at their longest length, first and last evaluation."""
    longest: dict[str, int] = {}
    for record in evaluations:
        for key in record["eval"]:
            name, _, length = key.partition("@")
            if length.isdecimal() and name != "loss":
                longest[name] = max(longest.get(name, 0), int(length))
    facts = []
    for name in sorted(longest, key=lambda name: name != "perplexity")[:MOST_FINDINGS]:
        key = f"{name}@{longest[name]}"
        values = [
            (record["step"], to_float(record["eval"][key]))
            for record in evaluations
            if key in record["eval"]
        ]
        (first, before), (last, after) = values[0], values[-1]
        label = "Held-out perplexity" if name == "perplexity" else name
        since = f"step {first:,} to " if last > first else ""
        facts.append(
            Fact(
                label=f"{label} at {longest[name]:,} tokens",
                value=four_figures(after),
                before=four_figures(before) if last > first else None,
                note=f"{since}step {last:,}, during training",
            )
        )
    return facts


def summary_section(files: RunFiles) -> Section:
    section = Section()
    if files.started:
        for make in (_size, _progress, _training, _alarms, _device):
            section.facts += section.guarded("run.json", lambda make=make: [*make(files)]) or []
    return section


def _size(files: RunFiles) -> Iterator[Fact]:
    run = files.run
    if "parameters" in run:
        yield Fact("parameters", compact(run["parameters"]), f"{run['parameters']:,}")
    if "trainable" in run and run.get("parameters"):
        share = 100 * run["trainable"] / run["parameters"]
        yield Fact("trained", compact(run["trainable"]), f"{share:.3g}% of all")
    if length := files.context.get("length"):
        yield Fact("context", f"{length:,}", "tokens")


def _progress(files: RunFiles) -> Iterator[Fact]:
    schedule = files.context.get("schedule") or [[None]]
    total, done = schedule[-1][0], files.steps[-1]["step"] if files.steps else 0
    yield Fact("steps", f"{done:,}", f"of {total:,}" if total and total != done else "")


def _training(files: RunFiles) -> Iterator[Fact]:
    steps = files.steps
    if not steps:
        return
    counted = clipped(files.run.get("counted", "tokens"))
    number = np.nansum(column(steps, counted))
    yield Fact(f"trained {counted}", compact(number), f"{number:,.0f} in all")
    yield Fact("time in steps", duration(np.nansum(column(steps, "seconds"))))
    if (mfu := finite_column(steps, "mfu")).size:
        note = "of the peak in bfloat16, median"
        yield Fact("MFU", f"{100 * np.median(mfu):.3g}%", note)
    headline = clipped(files.run.get("headline", "loss"))
    if (values := finite_column(steps, headline)[-20:]).size:
        note = f"mean of {len(values)} steps" if len(values) > 1 else ""
        yield Fact(f"{headline} at the end", four_figures(float(values.mean())), note)


def _alarms(files: RunFiles) -> Iterator[Fact]:
    skipped = sum(bool(record.get("skipped")) for record in files.steps)
    applied = sum(bool(r.get("spike")) and not r.get("skipped") for r in files.steps)
    back = sum(len(record.get("rollbacks", ())) for record in files.steps)
    if skipped or applied or back:
        note = f"{skipped:,} skipped, {applied:,} applied"
        note += f", {back:,} rolled back" if back else ""
        yield Fact("alarms", f"{skipped + applied + back:,}", note)


def _device(files: RunFiles) -> Iterator[Fact]:
    if "device" in files.run:
        device = clipped(files.run["device"])
        yield Fact("device", f"{files.run.get('devices', 1):,} \u00d7 {device}")
