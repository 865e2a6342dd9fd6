"""The section of evaluations: of the finished model, by lm-eval, and during training."""

import base64
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lljax.report import charts
from lljax.report.content import Figure, Image, Key, Section, Table
from lljax.report.drawing import svg
from lljax.report.lm_eval import lm_eval_table
from lljax.report.numbers import to_float
from lljax.report.run_files import RunFiles
from lljax.report.tables import MOST_COLUMNS, clipped, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

MOST_EVALUATIONS = 40  # the newest, in the table of evaluations during training
MOST_HEATMAP_ROWS = 64
LARGEST_IMAGE = 1 << 24  # bytes


def evaluation_section(files: RunFiles) -> Section:
    section, content = Section("Evaluation"), files.evaluation
    section.extend(section.tables, "evaluation.json", table_of, content.get("tables"))
    tables = (
        section.guarded("lm-eval's results", lm_eval_table, files.workdir),
        section.guarded("metrics.jsonl", during_training, files.evaluations),
    )
    section.tables += filter(None, tables)
    section.extend(section.figures, "evaluation.json", chart, content.get("charts"))
    section.extend(
        section.images,
        "evaluation.json",
        lambda row: image(files.workdir, row),
        content.get("images"),
    )
    return section


def during_training(evaluations: list[dict]) -> Table | None:
    """One row for each step and length: "loss@4096" is column loss of the row of 4,096 tokens."""
    rows: dict[tuple[int, int | None], dict[str, Any]] = {}
    for record in evaluations:
        for key, value in record["eval"].items():
            name, _, length = key.partition("@")
            row = record["step"], int(length) if length.isdecimal() else None
            rows.setdefault(row, {})[name] = value
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    shown = list(rows.items())[-MOST_EVALUATIONS:]
    caption = "Held-out documents, during training"
    if len(rows) > len(shown):
        caption += f" (the last {MOST_EVALUATIONS} of {len(rows)})"
    return table_of(
        {
            "columns": ["step", "length", *names],
            "rows": [
                [step, length, *(row.get(name) for name in names)] for (step, length), row in shown
            ],
            "caption": caption,
        }
    )


def chart(row: dict[str, Any]) -> Figure | None:
    """A chart of evaluation.json, as `lljax.evaluation.results.charts` writes it."""
    return CHARTS[row["kind"]](row)


def _curves(row: dict[str, Any]) -> Figure | None:
    title, lengths = clipped(row["title"]), _lengths(row)
    lines = {
        clipped(name): [_score(value) for value in values[: len(lengths)]]
        for name, values in [*row["lines"].items()][:MOST_COLUMNS]
    }
    figure = charts.length_chart(title, lengths, lines, log=bool(row["log"]))
    legend = tuple(Key(f"series{i % len(charts.SERIES)}", name) for i, name in enumerate(lines))
    return Figure(svg(figure, title), legend) if figure else None


def _heatmap(row: dict[str, Any]) -> Figure:
    return Figure(svg(heatmap_chart(row), clipped(row["title"])))


def heatmap_chart(row: dict[str, Any]) -> "MatplotlibFigure":
    """The figure of a heatmap in evaluation.json."""
    title, lengths = clipped(row["title"]), _lengths(row)
    rows = [clipped(name, 20) for name in row["rows"][:MOST_HEATMAP_ROWS]]
    values = [[_score(value) for value in scores[: len(lengths)]] for scores in row["values"]]
    samples = [int(n) for n in row["samples"]]
    return charts.heatmap(title, lengths, rows, values[: len(rows)], samples)


CHARTS = {"curves": _curves, "heatmap": _heatmap}


def _lengths(row: dict[str, Any]) -> list[int]:
    return [int(length) for length in row["lengths"][:MOST_COLUMNS]]


def _score(value: Any) -> float:
    """A score, NaN if it is missing or too large to be one."""
    number = to_float(value)
    return number if abs(number) < 1e100 else math.nan


def image(workdir: Path, row: dict[str, Any]) -> Image | None:
    """A PNG of `workdir`, two pixels to a CSS pixel; None for a link or for any other file."""
    path = workdir / Path(str(row["file"])).name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_IMAGE:
        return None
    png = path.read_bytes()
    if not png.startswith(b"\x89PNG"):
        return None
    return Image(
        source=f"data:image/png;base64,{base64.b64encode(png).decode()}",
        title=clipped(row["title"]),
        width=int.from_bytes(png[16:20]) // 2,
    )
