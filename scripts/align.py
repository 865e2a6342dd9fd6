"""Train on preferences or on rewards of a model's own answers. As `lljax align`.

python scripts/align.py --config=configs/quickstart_align.py --workdir=runs/quickstart_align
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("align", *sys.argv[1:])
