"""report.html: the results of a run on one page that needs no other file and no network."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lljax.data.files import atomic_write
from lljax.errors import first_line
from lljax.report import curves, details, evaluations, quantized, summary
from lljax.report.content import Section
from lljax.report.run_files import read_run
from lljax.report.tables import cell, numeric_column

if TYPE_CHECKING:
    from jinja2 import Environment

SECTIONS = (  # from top to bottom
    summary.finding,
    summary.summary_section,
    curves.curves_section,
    evaluations.evaluation_section,
    quantized.quantized_section,
    details.time,
    details.data,
    details.commands,
    details.configuration,
)


def write_report(workdir: Path | str) -> Path:
    """Writes report.html into `workdir` and returns its path. If a file is missing, its section is
    omitted; if it is damaged, a note replaces it.

    Reads config.json, run.json, metrics.jsonl, data_statistics.json, profile.json (a
    `lljax.report.breakdown.Breakdown`), export/*/compression.json, the results of the
    lm-evaluation-harness, and evaluation.json: {"finding": [{"what", "before", "after", "note"},
    ...], "tables": [{"columns": [name, ...], "rows": [[cell, ...], ...], "caption": text}],
    "charts": rows of `lljax.report.evaluations.CHARTS`, "images": [{"file": name of a PNG in
    `workdir`, "title": text}]}.

    Raises:
      ConfigError: no run was started in `workdir`, and nothing was evaluated there.
      OSError: report.html cannot be written.
    """
    workdir = Path(workdir)
    files = read_run(workdir)
    sections = []
    for make in SECTIONS:
        try:
            sections.append(make(files))
        except Exception as error:
            logging.warning(
                "report.html has a note instead of a section: %s (%s)",
                first_line(error),
                type(error).__name__,
            )
            sections.append(Section(notes=["A damaged section is left out."]))
    path = workdir / "report.html"
    write_page(path, workdir.resolve().name, sections, subtitle=files.model)
    return path


def write_page(
    path: Path, title: str, sections: Sequence[Section], *, subtitle: str = "", finding: bool = True
) -> None:
    """Writes a standalone HTML page of `sections`; empty ones are left out.

    finding: the first section is emphasized.
    Raises:
      OSError: `path` cannot be written.
    """
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            subtitle=subtitle,
            finding=sections[0] if finding and sections else None,
            sections=[section for section in sections if section],
            written=time.strftime("%Y-%m-%d %H:%M"),
        )
    )
    atomic_write(path, page.encode("utf-8", "backslashreplace"))


def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lljax", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"cell": cell, "numeric_column": numeric_column}
    return environment
