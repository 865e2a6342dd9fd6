"""Compile a run for devices that are not here: does it fit, how long? As `lljax plan`.

python scripts/plan.py --config=configs/qwen_32k.py --device=h100-80g:8
python scripts/plan.py --config=configs/qwen_32k.py --device=v5e-8 --search=context
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("plan", *sys.argv[1:])
