"""Continue a prompt, or chat. As `lljax generate`.

python scripts/generate.py --workdir=runs/quickstart --prompt='def main():'
python scripts/generate.py --workdir=runs/mine --chat
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("generate", *sys.argv[1:])
