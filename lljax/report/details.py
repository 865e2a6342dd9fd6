"""The rest of the page: where the time goes, the data, commands to go on, the configuration."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from lljax.config.exports import formats
from lljax.config.tree import value_or_default
from lljax.report import charts
from lljax.report.breakdown import Breakdown
from lljax.report.content import Command, Figure, Key, Section, Table
from lljax.report.drawing import svg
from lljax.report.numbers import duration, finite_column
from lljax.report.run_files import RunFiles
from lljax.report.tables import clipped, table_of

HELD_OUT, CHAT = "held out", "chat"
EXPORT = "lljax export --workdir={run} --format="
EVALUATE = "lljax evaluate --workdir={run}"
COMMANDS = (  # title, command, and what it needs of a run: an export's format, HELD_OUT or CHAT
    ("An adapter for PEFT", EXPORT + "peft", "peft"),
    ("A checkpoint for transformers and vLLM", EXPORT + "merged", "merged"),
    ("A base and a plain LoRA for vllm --enable-lora", EXPORT + "split", "split"),
    ("A checkpoint of 4 bits, calibrated on its documents", EXPORT + "w4a16", "w4a16"),
    ("A file for llama.cpp, Ollama and LM Studio", EXPORT + "gguf", "gguf"),
    ("Held-out perplexity by length", EVALUATE, HELD_OUT),
    ("Retrieval from long texts", EVALUATE + " --tasks=passkey,needle,ruler", None),
    ("Continue a text", "lljax generate --workdir={run} --prompt='...'", None),
    ("Chat", "lljax generate --workdir={run} --chat", CHAT),
    ("Serve the merged model", "vllm serve {run}/export/merged --max-model-len {length}", "merged"),
)
LONGEST_FIELD = 4000  # characters of a configuration's value


def time(files: RunFiles) -> Section:
    """The parts of a traced step (profile.json), and how long the devices waited for data."""
    section = Section("Where the time goes")
    waited = finite_column(files.steps, "data_seconds")
    seconds = finite_column(files.steps, "seconds")
    if waited.size and seconds.sum():
        section.notes.append(
            f"Waiting for data: {waited.sum() / seconds.sum():.1%} of the time in steps, "
            f"the longest {duration(waited.max())}."
        )
    if files.profile:
        section.guarded("profile.json", _add_breakdown, section, files.profile)
    return section


def _add_breakdown(section: Section, profile: dict[str, Any]) -> None:
    breakdown = Breakdown(**profile)
    parts = breakdown.parts()
    title = f"A step of {duration(breakdown.seconds)}"
    steps = f"step {breakdown.steps[0]:,}"
    if len(breakdown.steps) > 1:
        steps = f"steps {breakdown.steps[0]:,} to {breakdown.steps[-1]:,}"
    shown = parts | {"overlapped collectives": breakdown.hidden}
    table = Table(
        columns=["", "seconds a step", "%"],
        rows=[
            [name, value, round(100 * value / breakdown.seconds, 1)]
            for name, value in shown.items()
        ],
        caption=f"From the trace of {steps}, the average of {breakdown.devices} devices",
    )
    legend = tuple(Key(f"part{i}", name) for i, name in enumerate(parts))
    figure = Figure(svg(charts.share_bar(title, parts), title), legend)
    section.tables.append(table)
    section.figures.append(figure)


def data(files: RunFiles) -> Section:
    section = Section("Data")
    section.guarded("data_statistics.json", _add_statistics, section, files.statistics)
    return section


def _add_statistics(section: Section, statistics: dict[str, Any]) -> None:
    parts = {part: numbers for part, numbers in statistics.items() if numbers.get("documents")}
    if not parts:
        return
    quantiles = list(
        dict.fromkeys(name for numbers in parts.values() for name in numbers.get("lengths", {}))
    )
    rows = []
    for part, numbers in parts.items():
        tokens, trained = numbers.get("tokens"), numbers.get("trained_tokens")
        percent = round(100 * trained / tokens) if tokens and trained is not None else None
        lengths = [numbers.get("lengths", {}).get(name) for name in quantiles]
        rows.append([part, numbers["documents"], tokens, trained, percent, *lengths])
    section.tables.append(
        table_of(
            {
                "columns": ["", "documents", "tokens", "trained", "%", *quantiles],
                "rows": rows,
                "caption": "Documents, trained tokens, and quantiles of the lengths in tokens",
            }
        )
    )
    section.extend(section.figures, "data_statistics.json", _histogram, [*parts.items()])


def _histogram(part: tuple[str, dict[str, Any]]) -> Figure | None:
    name, numbers = part
    histogram = numbers.get("histogram", {})
    if not histogram.get("counts"):
        return None
    title = f"Documents by length: {clipped(name)}"
    return Figure(
        svg(charts.bar_chart(title, histogram["edges"], histogram["counts"], "tokens"), title)
    )


def commands(files: RunFiles) -> Section:
    """The commands that export, evaluate and use a run."""
    section = Section("Next steps")
    if files.started:
        last = files.steps[-1].get("length") if files.steps else None
        length = files.context.get("length") or last or 8192
        run = shlex.quote(str(files.workdir))
        given = _given(files)
        section.commands += [
            Command(title, command.format(run=run, length=length))
            for title, command, need in COMMANDS
            if need is None or need in given
        ]
    return section


def _given(files: RunFiles) -> set[str]:
    """What a run has of the needs of COMMANDS."""
    given = set(formats(files.config))
    if any(value_or_default(files.config, f"data.{f}") for f in ("valid", "valid_fraction")):
        given.add(HELD_OUT)
    # A run that trained conversations can chat too, under lljax's template.
    train = files.statistics.get("train")
    conversations = isinstance(train, dict) and train.get("conversations")
    if conversations or files.run.get("chat_template", True):  # not in runs of earlier versions
        given.add(CHAT)
    return given


def configuration(files: RunFiles) -> Section:
    section = Section("Configuration")
    section.fields = {
        clipped(field): clipped(json.dumps(value, ensure_ascii=False), LONGEST_FIELD)
        for field, value in _flat(files.config)
    }
    return section


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
