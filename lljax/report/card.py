"""The model card of an export: README.md for the hub, with its pictures, from what the export and
its run recorded.
"""

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lljax.report.card_export import (
    BASE,
    TRAINED,
    Export,
    base_link,
    guarded,
    is_trained,
    lengths_of,
    markdown_text,
)
from lljax.report.card_limits import limits
from lljax.report.card_metadata import metadata
from lljax.report.card_training import facts, stages
from lljax.report.content import Section, Table
from lljax.report.curves import headline_chart
from lljax.report.drawing import png
from lljax.report.evaluations import during_training, heatmap_chart
from lljax.report.lm_eval import lm_eval_table
from lljax.report.run_files import RunFiles
from lljax.report.summary import finding
from lljax.report.tables import cell, numeric_column, table_of

CARD, LOSS = "README.md", "loss.png"
# What the one who exports could do instead, in a comment among these lines.
ADVICE = re.compile(r"^(# .*?): (?:export with )?--\w+=.*$", re.MULTILINE)
# A line of a shell among the lines of Python that load an export.
SHELL = re.compile(r"(?:# )?((?:[A-Z_]+=\S+ )*(?:vllm|ollama|llama-[\w-]+|\./llama-[\w-]+) .*)")


def card_files(export: Export, files: RunFiles | None) -> dict[str, bytes]:
    """The card and its pictures, by name.

    files: of the run that was exported, or of a folder with an evaluation; None without one.
    """
    run = _until(files, export.record.get("step")) if files else None
    drawn, usage = _pictures(run) if run else {}, usage_blocks(export)
    pictures = {name: title for name, (title, _) in drawn.items()}
    parts = {
        "metadata": metadata(export, run),
        "summary": _summary(export, run),
        "finding": guarded("evaluation.json", _finding, run) if run else None,
        "usage": usage,
        "base_to_find": export.base if _is_named(export, usage) else "",
        "tables": _tables(run, newest=run is files) if run else [],
        "heatmaps": {name: pictures[name] for name in pictures if name != LOSS},
        "facts": [*facts(export, run)],
        "stages": guarded("config.json", stages, run) if run and run.started else None,
        "loss": pictures.get(LOSS),
        "limits": [*limits(export, run)],
    }
    template = _environment().get_template("card.md.j2")
    text = template.render(export=export, version=version("lljax"), **parts)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    contents = {name: content for name, (_, content) in drawn.items()}
    return {CARD: text.encode("utf-8", "replace"), **contents}


def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lljax", "assets"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"text": markdown_text, "table": markdown_table}
    return environment


def markdown_table(table: Table) -> str:
    """A table in Markdown, numbers to the right."""
    columns = range(len(table.columns))
    rules = ["---:" if numeric_column(table.rows, i) else "---" for i in columns]
    rows = [[cell(value).text for value in row] for row in table.rows]
    lines = [[*map(markdown_text, row)] for row in (table.columns, *rows)]
    lines.insert(1, rules)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def usage_blocks(export: Export) -> list[tuple[str, str]]:
    """(language, lines) that load the export from a folder of the repository's name: the recorded
    lines, those of a shell apart.
    """
    usage = str(export.record.get("usage", ""))
    base = str(export.record.get("base", ""))
    paths = [(str(export.record.get("written_to", "")), export.name), (base, export.base)]
    if base.endswith(".gguf"):  # transformers takes its folder
        paths.append((str(Path(base).parent), export.base if export.base_is_public else "."))
    for path, name in paths:
        if path and name:
            usage = replace_path(usage, path, name)
    python, shell = [], []
    for line in ADVICE.sub(r"\1.", usage).splitlines():
        if match := SHELL.fullmatch(line):
            shell.append(match[1])
        else:
            python.append(line)
    blocks = [("python", "\n".join(python).strip()), ("bash", "\n".join(shell).strip())]
    return [(language, lines) for language, lines in blocks if lines]


def _is_named(export: Export, usage: list[tuple[str, str]]) -> bool:
    """Whether the lines name a base that is not on the hub."""
    name = rf"(['\"]|serve ){re.escape(export.base)}(['\"\s]|$)"
    if export.base_is_public or not export.base:
        return False
    return any(re.search(name, lines) for _, lines in usage)


def replace_path(usage: str, path: str, name: str) -> str:
    """The lines with `name` in place of `path`, where it stands as a path: in quotes, as a value or
    argument, whole or before a slash.
    """
    before = r"""(['"=]|\bserve |\s-{1,2}[\w-]+ )"""
    return re.sub(
        rf"{before}{re.escape(path)}(?=['\"/\s]|$)",
        lambda match: match[1] + name,
        usage,
        flags=re.MULTILINE,
    )


def _until(files: RunFiles, step: Any) -> RunFiles:
    """The run up to the step that was exported. Its evaluation, which is of the newest checkpoint,
    counts if there is no later step.
    """
    if type(step) is not int or not files.steps or step >= files.steps[-1]["step"]:
        return files
    return replace(
        files,
        steps=[record for record in files.steps if record["step"] <= step],
        evaluations=[record for record in files.evaluations if record["step"] <= step],
        evaluation={},
    )


def _summary(export: Export, run: RunFiles | None) -> str:
    """The first sentence: what this is."""
    base = base_link(export)
    if export.adapter:
        kind = f"A LoRA adapter for {base}"
        kind += ", with the base to serve it on," if export.format == "split" else ""
    else:
        kind = f"A fine-tune of {base}" if is_trained(export, run) else base
    kind += f" in the format {export.format}" if export.is_gguf or export.quantization else ""
    before, after = lengths_of(export, run)
    if not after:
        return f"{kind}."
    grown = f" instead of {before:,}" if before and before < after else ""
    return f"{kind} for texts of up to {after:,} tokens{grown}."


def _finding(run: RunFiles) -> Table | None:
    facts = [fact for fact in finding(run).facts if fact.before is not None]
    rows = [[fact.label, fact.before, fact.value, fact.note] for fact in facts]
    notes = [re.sub(r"^base \u2192 trained(, )?", "", str(row[3])) for row in rows]
    base = not run.evaluations or bool(run.evaluation.get("finding"))
    columns = ["", *(("base", "trained") if base else ("first", "last")), "note"]
    rows = [[*row[:3], note] for row, note in zip(rows, notes, strict=True)]
    return Table(columns, rows) if rows else None


def _tables(run: RunFiles, *, newest: bool) -> list[Table]:
    """The tables of the evaluation, or else of the evaluations during training; those of lm-eval if
    the export is of the newest checkpoint.
    """
    section = Section()
    section.extend(section.tables, "evaluation.json", table_of, run.evaluation.get("tables"))
    if not section.tables and run.evaluations:
        table = section.guarded("metrics.jsonl", during_training, run.evaluations)
        section.tables += [table] if table else []
    if newest:
        table = section.guarded("lm-eval's results", lm_eval_table, run.workdir)
        section.tables += [table] if table else []
    return section.tables


def _pictures(run: RunFiles) -> dict[str, tuple[str, bytes]]:
    """{file: (title, PNG)}: the heatmaps of base and trained model, and the loss."""
    section, drawn = Section(), {}
    rows = run.evaluation.get("charts")
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or row.get("kind") != "heatmap":
            continue
        title = str(row.get("title", ""))
        model = title.rpartition(": ")[2]
        if model == BASE or model.startswith(TRAINED):
            figure = section.guarded("evaluation.json", heatmap_chart, row)
            if figure is not None:
                name = re.sub(r"\W+", "-", model.lower()).strip("-")
                drawn[f"needles-{name}.png"] = title, png(figure)
    if run.steps:
        chart = section.guarded("metrics.jsonl", headline_chart, run)
        if chart is not None:
            drawn[LOSS] = f"{chart[1]} over the steps", png(chart[0])
    return drawn
