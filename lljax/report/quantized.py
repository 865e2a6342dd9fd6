"""The section of quantized exports: what was written, and how much of its output each kernel loses
on the calibration rows.
"""

import re
import statistics
from typing import Any

from lljax.data.files import read_object
from lljax.report import charts
from lljax.report.content import Figure, Section, Table
from lljax.report.drawing import svg
from lljax.report.numbers import to_float
from lljax.report.run_files import RunFiles
from lljax.report.tables import clipped

MOST_EXPORTS = 20


def quantized_section(files: RunFiles) -> Section:
    """Of every folder in `workdir`/export with a compression.json
    (lljax.compression.compress.assemble).
    """
    section, rows = Section("Quantized exports"), []
    for path in sorted((files.workdir / "export").glob("*/compression.json"))[:MOST_EXPORTS]:
        name, report = clipped(path.parent.name), read_object(path)
        row = section.guarded(f"{name}/{path.name}", _row, name, report)
        rows += [row] if row else []
        figure = section.guarded(f"{name}/{path.name}", _figure, name, report)
        section.figures += [figure] if figure else []
    if rows:
        section.tables.append(
            Table(
                ["export", "method", "layout", "bits", "group", "MB", "median loss %", "largest %"],
                rows,
                "Loss: the share of the energy of a kernel's output that rounding changes, on the "
                "calibration rows. Measure what it costs with `lljax evaluate --exports`.",
            )
        )
    return section


def _row(name: str, report: dict[str, Any]) -> list[Any]:
    recipe, errors = report["recipe"], _errors(report)
    scheme = recipe["scheme"]
    losses = [error for some in errors.values() for error in some]
    return [
        name,
        clipped(recipe["method"]),
        clipped(recipe["layout"]),
        int(scheme["bits"]),
        "all" if scheme["group"] == -1 else int(scheme["group"]),
        round(report["bytes"] / 1e6, 1),
        round(statistics.median(losses), 3) if losses else None,
        round(max(losses), 3) if losses else None,
    ]


def _figure(name: str, report: dict[str, Any]) -> Figure | None:
    if not (errors := _errors(report)):
        return None
    title = f"{name}: output lost by each kernel, %"
    return Figure(svg(charts.spread(title, errors), title))


def _errors(report: dict[str, Any]) -> dict[str, list[float]]:
    """In percent, of all layers, by the name of the kernel within a layer; experts together."""
    errors: dict[str, list[float]] = {}
    for layer in report["layers"]:
        for module, row in layer.items():
            if row.get("error") is not None:
                kind = re.sub(r"^.*\.layers\.\d+\.|(?<=experts)\.\d+", "", module)
                errors.setdefault(clipped(kind, 40), []).append(100 * to_float(row["error"]))
    return errors
