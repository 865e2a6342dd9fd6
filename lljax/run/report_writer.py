"""Writes report.html while a run goes on and at its end."""

import logging
from pathlib import Path

from lljax.errors import first_line
from lljax.parallel.processes import is_first
from lljax.report.page import write_report
from lljax.run.observer import Observer, RunInfo


class ReportWriter(Observer):
    """Writes the report every `training.report_every` steps and when the run is done.

    After a step the report waits for the evaluation of that step: it is written before the next
    step begins. No run depends on it: a report that cannot be written is a warning.
    """

    def open(self, run: RunInfo) -> None:
        self._workdir = run.workdir
        self.every = run.config.training.report_every
        self._due = False

    def step(self, record: dict) -> None:
        self._due = True

    def begin(self, step: int) -> None:
        if self._due:
            self._due = False
            _write(self._workdir)

    def close(self, error: BaseException | None) -> None:
        if error is None:
            _write(self._workdir)


def _write(workdir: Path) -> None:
    if is_first():
        try:
            write_report(workdir)
        except Exception as error:
            logging.warning(
                "%s: the report could not be written (%s: %s); lljax report tries again",
                workdir,
                type(error).__name__,
                first_line(error),
            )
