"""Make, check, measure and show training documents. As `lljax data`.

python scripts/prepare_data.py folder ~/code/project --include='*.py' --out=data/project.jsonl
python scripts/prepare_data.py stdlib --out=data/stdlib.jsonl
python scripts/prepare_data.py stats data/project.jsonl --model=lljax/assets/tiny-512 --length=4096
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("data", *sys.argv[1:])
