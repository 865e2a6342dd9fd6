"""Scores as tables, in the form that evaluation.json and the report take: {"columns", "rows",
"caption"}, cells as text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.ruler import THRESHOLD
from lljax.evaluation.scores import (
    Score,
    effective_lengths,
    family_means,
    sample_counts,
    split_by_texts,
    with_groups,
)
from lljax.report.numbers import MISSING, short_length


def tables(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """A table of perplexities and a table of all other scores, as far as there are any.

    Rows are tasks and models, columns are lengths. The caption has the number of examples; where a
    task has several numbers, its cells have them.
    """
    perplexities = split_by_texts(
        [score for protocol in PROTOCOLS for score in scores if score.task == protocol]
    )
    others = [score for score in scores if score.task not in PROTOCOLS]
    result = []
    if perplexities:
        result.append(_table(perplexities, _perplexity_caption(perplexities), decimals=2))
    if others:
        means = family_means(others)
        caption = f"Scores from 0 to 100 by length in tokens{_samples_text(sample_counts(others))}."
        if reached := effective_lengths(means):
            lengths = (
                f"{model} {short_length(n) if n else 'none'}" for model, n in reached.items()
            )
            caption += (
                f" Effective length, up to which RULER's mean stays above {THRESHOLD}: "
                f"{', '.join(lengths)}."
            )
        result.append(_table([*with_groups(others), *means], caption, decimals=1))
    return result


def _perplexity_caption(scores: Sequence[Score]) -> str:
    parts = ["Held-out perplexity by length in tokens, full attention."]
    for task, counts in sample_counts(scores).items():
        bounds = " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))
        parts.append(f"{task}: {bounds} {PROTOCOLS[task.partition(',')[0]]}.")
    return " ".join(parts)


def _samples_text(counts: Mapping[str, set[int]]) -> str:
    """For a caption: ", 10 examples each", or the tasks of each number of examples. Tasks with
    several numbers are left out: their cells have them.
    """
    numbers = sorted(set().union(*counts.values()))
    if len(numbers) == 1:
        return f", {numbers[0]} example{'s' * (numbers[0] != 1)} each"
    text = ""
    for number in numbers:
        tasks = [task for task, of_task in counts.items() if of_task == {number}]
        text += f"; {number} examples of {', '.join(tasks)}" if tasks else ""
    return text


def _table(scores: Sequence[Score], caption: str, decimals: int) -> dict[str, Any]:
    lengths = sorted({score.length for score in scores})
    several = {task for task, counts in sample_counts(scores).items() if len(counts) > 1}
    cells = {}
    for score in scores:
        if math.isnan(score.score):
            text = MISSING
        else:
            samples = f" (n={score.samples})" if score.task in several else ""
            text = f"{score.score:,.{decimals}f}{samples}"
        cells[score.task, score.model, score.length] = text
    rows = [
        [task, model, *(cells.get((task, model, length), MISSING) for length in lengths)]
        for task in dict.fromkeys(score.task for score in scores)
        for model in dict.fromkeys(score.model for score in scores)
        if any((task, model, n) in cells for n in lengths)
    ]
    return {
        "columns": ["task", "model", *map(short_length, lengths)],
        "rows": rows,
        "caption": caption,
    }


def markdown(table: Mapping[str, Any]) -> str:
    """A table in Markdown, its caption below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    rule = "|---|---|" + "---:|" * (len(table["columns"]) - 2) + "\n"
    rows = "".join(map(line, table["rows"]))
    return f"{line(table['columns'])}{rule}{rows}\n{table['caption']}\n"
