"""Train on preferences (DPO, KTO, ...) or on rewards of a model's own answers (GRPO, ...); the same
command again resumes from the last checkpoint.

lljax align --config=quickstart_align --workdir=runs/quickstart_align
lljax align --config=configs/dpo_longdocs.py --workdir=runs/dpo --config.objective.beta=0.05
lljax align --config=configs/grpo_keychain.py --workdir=runs/grpo
"""

from collections.abc import Sequence

from lljax.cli import train
from lljax.config import Config, validate
from lljax.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Reads the flags of `argv` and trains; exits with the code of an error."""
    train.run("align", argv, __doc__ or "", check)


def check(config: Config) -> None:
    """Raises ConfigError if the configuration cannot work, or trains on documents."""
    from lljax.objectives.table import OBJECTIVES  # imported here: --help starts sooner

    validate(config)
    if OBJECTIVES[config.objective.name].kind == "documents":
        raise ConfigError(
            f"objective.name={config.objective.name!r} trains on documents: use lljax train, or "
            "another objective such as 'dpo', 'kto' or 'grpo'"
        )
