"""A run described by one flat YAML file, for users of YAML trainers.

lljax train --config=configs/from_yaml.py:run.yaml --workdir=runs/mine

--config=run.yaml does the same.
"""

from lljax.config import Config
from lljax.config.yaml import read
from lljax.errors import ConfigError


def get_config(path: str = "") -> Config:
    if not path:
        raise ConfigError(
            "configs/from_yaml.py: name the YAML file, such as --config=run.yaml or "
            "--config=configs/from_yaml.py:run.yaml"
        )
    return read(path)
