"""What is not known of an exported model, and what it pays, as its card says it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lljax.errors import counted
from lljax.report.card_export import (
    BASE,
    TRAINED,
    Export,
    finite_scores,
    lengths_of,
    markdown_text,
    schedule_of,
)
from lljax.report.numbers import four_figures
from lljax.report.run_files import RunFiles

FEW = 50  # examples, below which a score is called uncertain


def _evaluated(run: RunFiles) -> list[int]:
    """The lengths at which the trained model was evaluated."""
    lengths = {s["length"] for s in finite_scores(run) if s["model"].startswith(TRAINED)}
    return sorted(lengths)


def limits(export: Export, run: RunFiles | None) -> Iterator[str]:
    _, length = lengths_of(export, run)
    scores, lengths = (finite_scores(run), _evaluated(run)) if run else ([], [])
    if not scores:
        during = " beyond the held-out documents of the training" if run and run.evaluations else ""
        yield f"It was not evaluated{during}: measure it on your task before you rely on it."
    if lengths and length and lengths[-1] < length:
        yield (
            f"It was evaluated up to {lengths[-1]:,} tokens, and reads {length:,}: how well it "
            "does in between is not known."
        )
    elif lengths:
        yield f"It was evaluated up to {lengths[-1]:,} tokens; nothing is known beyond."
    if scores and (least := min(score["samples"] for score in scores)) < FEW:
        yield (
            f"Some scores rest on {counted(least, 'example')}: small differences between them are "
            "chance."
        )
    if scores and (export.quantization or export.is_gguf):
        yield "The scores are of the trained weights before they were written in this format."
    if run:
        yield from _costs(scores)
    if run and run.started and (stages := schedule_of(run)) and stages[-1][2] != "full":
        yield (
            f"Its training ended in {stages[-1][2]} attention, while it is used with full "
            "attention: retrieval from long texts tends to suffer from that."
        )
    yield (
        "Knowledge, instruction following, safety and bias were not measured; those of the base "
        "may have changed."
        if run and run.started
        else "Knowledge, safety and bias are not measured here: see the base's card."
    )


def _costs(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Tasks whose score at the shortest common length is worse than the base's."""
    by_key = {(s["model"], s["task"], s["length"]): float(s["score"]) for s in scores}
    for task in dict.fromkeys(score["task"] for score in scores):
        both = [n for m, t, n in by_key if m == TRAINED and t == task and (BASE, t, n) in by_key]
        if not both:
            continue
        shortest = min(both)
        after, before = by_key[TRAINED, task, shortest], by_key[BASE, task, shortest]
        if after > before if task.startswith("perplexity") else after < before:
            yield (
                f"Short texts pay for the long ones: {markdown_text(task)} at {shortest:,} tokens "
                f"is {four_figures(after)}, and {four_figures(before)} for the base."
            )
