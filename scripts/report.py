"""Writes the report of a run, at any moment of it.

python scripts/report.py --workdir=runs/quickstart
"""

import argparse
from pathlib import Path

from lljax.errors import ConfigError, exit_cleanly, first_line, printable
from lljax.report.page import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    with exit_cleanly():
        try:
            print(printable(str(write_report(arguments.workdir))))
        except OSError as error:
            raise ConfigError(
                f"--workdir={arguments.workdir}: report.html cannot be written ({first_line(error)})"
            ) from None


if __name__ == "__main__":
    main()
