"""Writes the report of a run, at any moment of it.

python scripts/report.py --workdir=runs/quickstart
"""

import argparse
from pathlib import Path

from lljax.errors import ConfigError, exit_cleanly
from lljax.training.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    with exit_cleanly():
        if not (arguments.workdir / "config.json").is_file():
            raise ConfigError(f"--workdir={arguments.workdir}: no run was started there (no config.json)")
        print(write_report(arguments.workdir))


if __name__ == "__main__":
    main()
