"""A run described by one flat YAML file, for those who come from YAML trainers.

python scripts/train.py --config=configs/from_yaml.py:run.yaml --workdir=runs/mine
"""

from lljax.yaml_config import read


def get_config(path: str):
    return read(path)
