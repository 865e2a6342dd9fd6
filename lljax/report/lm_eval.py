"""Reads the results that the lm-evaluation-harness left in a run's folder."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lljax.data.files import read_object
from lljax.errors import first_line
from lljax.report.content import Table
from lljax.report.tables import table_of

# Where --output_path may have put them.
PATTERNS = ("results_*.json", "*/results_*.json", "lm_eval/**/results_*.json")
COLUMNS = ["task", "model", "shots", "metric", "value", "stderr", "n"]


def lm_eval_table(workdir: Path) -> Table | None:
    """The newest value of each model, task and metric."""
    files = {path for pattern in PATTERNS for path in workdir.glob(pattern)}
    rows: dict[tuple, list] = {}
    for path in sorted(files, key=lambda path: path.name):
        try:
            rows |= {(row[0], row[1], row[3]): row for row in _rows(read_object(path))}
        except (AttributeError, TypeError) as error:  # another file under such a name
            logging.warning("%s is ignored: %s", path, first_line(error))
    if not rows:
        return None
    return table_of(
        {"columns": COLUMNS, "rows": [*rows.values()], "caption": "lm-evaluation-harness"}
    )


def _rows(results: dict[str, Any]) -> Iterator[list]:
    """Rows of a results file of lm_eval 0.4: {"results": {task: {"acc,none": 0.5,
    "acc_stderr,none": 0.1, "alias": ...}}}.
    """
    arguments = results.get("config", {}).get("model_args", "")
    if isinstance(arguments, dict):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    for task, values in results.get("results", {}).items():
        shots = results.get("n-shot", {}).get(task)
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric}, {filtered}"
                error = values.get(f"{metric}_stderr,{filtered}")  # "N/A" if there is none
                error = error if isinstance(error, (int, float)) else None
                yield [task, arguments, shots, name, value, error, samples]
