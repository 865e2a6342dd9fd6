"""Train from a config file; the same command again resumes. As `lljax train`.

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
python scripts/train.py --config=configs/qwen_32k.py --workdir=runs/mine --config.lora.rank=16
python scripts/train.py --config=run.yaml --workdir=runs/from_yaml
"""

import sys

from lljax.cli.main import run

if __name__ == "__main__":
    run("train", *sys.argv[1:])
