"""Serve models behind the OpenAI API. As `lljax serve`.

python scripts/serve.py --workdir=runs/quickstart
python scripts/serve.py --model=lljax/assets/tiny-512 --adapter=code=runs/quickstart/export/peft
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("serve", *sys.argv[1:])
