"""A config field from outside, as one row, in a run: trained with, reported, resumed, kept."""

import json

import jax
import pytest

from lljax.config import FIELDS, Field, default_config
from lljax.config.checks import whole
from lljax.errors import ConfigError
from lljax.run.loop import train


@pytest.mark.slow
def test_a_run_with_a_field_from_outside_trains_and_resumes_only_with_its_value(
    monkeypatch, run_config, tmp_path
):
    row = Field("training.toy", 1, "a toy", check=whole(0), identity=True)
    monkeypatch.setitem(FIELDS, row.name, row)
    c = default_config()
    c.update(run_config)
    c.training.toy, c.training.rows = 5, 1
    c.context.schedule = ((1, 32, "full"),)
    run = {"workdir": tmp_path, "devices": jax.devices()[:1]}
    train(c, **run)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["toy"] == 5
    assert (tmp_path / "report.html").exists()
    c.training.toy = 6
    with pytest.raises(ConfigError, match=r"another training.toy \(5, now 6\)"):
        train(c, **run)
    c.training.toy, c.context.schedule = 5, ((2, 32, "full"),)
    train(c, **run)
    assert (tmp_path / "checkpoints" / "2").exists()
