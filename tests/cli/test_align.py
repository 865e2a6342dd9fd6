import pytest

from lljax.cli import align
from lljax.config import default_config
from lljax.errors import ConfigError


def config_of(objective):
    c = default_config()
    c.model.path, c.data.train, c.objective.name = "base", ("rows.jsonl",), objective
    c.data.overlong = "drop"
    return c


def test_documents_are_trained_by_train():
    with pytest.raises(ConfigError, match="objective.name='sft' trains on documents: use lljax tr"):
        align.check(config_of("sft"))
    for objective in ("dpo", "kto", "grpo"):
        align.check(config_of(objective))


def test_the_configuration_is_checked_first():
    c = config_of("dpo")
    c.objective.simpo_gamma = 2.0
    with pytest.raises(ConfigError, match="objective.simpo_gamma=2.0"):
        align.check(c)
