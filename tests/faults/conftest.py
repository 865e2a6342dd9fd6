"""An undisturbed run, and the table of faults that the suite ends with."""

import collections
from pathlib import Path

import pytest
from faults.runs import SAVED_EVERY, STEPS, Run
from rich.console import Console
from rich.table import Table

TABLE = Path(__file__).parents[2] / "runs" / "faults.md"


class Whole:
    """An uninterrupted run with all of its checkpoints. states: step -> the checkpoint."""

    def __init__(self, run: Run):
        self.run, self.records = run, run.records()
        self.states = {
            step: run.newest(step) for step in range(SAVED_EVERY, STEPS + 1, SAVED_EVERY)
        }


@pytest.fixture(scope="session")
def whole(tiny, documents, tmp_path_factory):
    run = Run(
        tmp_path_factory.mktemp("whole") / "run",
        tiny,
        documents,
        f"--config.checkpoint.keep={STEPS}",
    )
    run.finish()
    return Whole(run)


@pytest.fixture
def new_run(tiny, documents, tmp_path):
    """new_run(name, *overrides) -> a Run that has not begun, of the same configuration as
    `whole`.
    """
    return lambda name, *overrides: Run(tmp_path / name, tiny, documents, *overrides)


class Row:
    """A row of the table: so many cases of a fault are to come, and each holds or not."""

    def __init__(self, fault: str, cases: int):
        self.fault, self.cases, self.held, self.broken = fault, cases, 0, []

    def case(self, holds: bool, case: object = "") -> None:
        self.held += bool(holds)
        self.broken += [] if holds else [case]

    def done(self) -> None:
        assert not self.broken, f"{self.fault}: {self.broken[:5]}"
        assert self.held == self.cases, f"{self.fault}: {self.held} of {self.cases} cases held"


@pytest.fixture
def tally(request):
    """tally(fault, cases) -> a Row; cases that a failing test does not reach have not held."""
    rows = []

    def begin(fault, cases):
        rows.append(Row(fault, cases))
        return rows[-1]

    yield begin
    request.node.user_properties += [("fault", (row.fault, row.cases, row.held)) for row in rows]


def pytest_terminal_summary(terminalreporter):
    faults = collections.defaultdict(lambda: [0, 0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for fault, cases, held in (
                    value for name, value in report.user_properties if name == "fault"
                ):
                    faults[fault][0] += cases
                    faults[fault][1] += held
    if not faults:
        return
    table = Table("fault", "cases", "held")
    for fault, counts in sorted(faults.items()):
        table.add_row(fault, *(f"{count:,}" for count in counts))
    Console().print(table)
    TABLE.parent.mkdir(exist_ok=True)
    lines = [
        f"| {fault} | {cases:,} | {held:,} |\n" for fault, (cases, held) in sorted(faults.items())
    ]
    TABLE.write_text("".join(["| fault | cases | held |\n|---|---|---|\n", *lines]))
