"""Perplexity and retrieval by length. As `lljax evaluate`.

python scripts/evaluate.py --workdir=runs/quickstart --lengths=512,1k,2k,4k
python scripts/evaluate.py --model=Qwen/Qwen3-8B --tasks=ruler --out=runs/ruler --chat
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("evaluate", *sys.argv[1:])
