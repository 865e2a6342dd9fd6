"""Write the report of a run, at any time during or after training.

lljax report --workdir=runs/quickstart
"""

from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import parser
from lljax.errors import ConfigError, exit_cleanly, first_line, printable


def main(argv: Sequence[str]) -> None:
    """Writes report.html into --workdir and prints its path."""
    command = parser("report", __doc__)
    command.add_argument("--workdir", type=Path, required=True)
    arguments = command.parse_args(argv)
    from lljax.report.page import write_report

    with exit_cleanly():
        try:
            print(printable(str(write_report(arguments.workdir))))
        except OSError as error:
            raise ConfigError(
                f"--workdir={arguments.workdir}: report.html cannot be written "
                f"({first_line(error)})"
            ) from None
