"""Export a trained model for PyTorch. As `lljax export`.

python scripts/export.py --workdir=runs/quickstart --format=peft
python scripts/export.py --workdir=runs/quickstart --format=merged
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("export", *sys.argv[1:])
