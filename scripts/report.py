"""Write the report of a run. As `lljax report`.

python scripts/report.py --workdir=runs/quickstart
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("report", *sys.argv[1:])
