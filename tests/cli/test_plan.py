"""`lljax plan`: tables, advice and exit code, compiled for the devices of this process."""

import dataclasses

import jax
import pytest

from lljax.cli import plan_tables
from lljax.cli.plan import main
from lljax.hardware import targets
from lljax.hardware.chips import DEVICES, GiB
from lljax.planning import search

CONFIG = """from lljax.config import default_config

def get_config():
    c = default_config()
    c.model.path, c.model.dtype = {tiny!r}, "float32"
    c.context.length = 64
    c.context.schedule = ((4, 64, "full"),)
    c.lora.rank = 2
    return c
"""


@pytest.fixture
def plan(tiny, tmp_path, monkeypatch, capsys):
    """Plans for a GPU with so much memory; returns the exit code and the printed text."""
    (tmp_path / "config.py").write_text(CONFIG.format(tiny=tiny))
    monkeypatch.setattr(targets.Target, "devices", lambda self: jax.devices()[: self.count])
    monkeypatch.setattr(plan_tables, "CONSOLE", plan_tables.console(least=160))

    def plan(memory: int, *flags: str) -> tuple[int, str]:
        monkeypatch.setitem(DEVICES, "l4", dataclasses.replace(DEVICES["l4"], memory=memory))
        code = 0
        try:
            main([f"--config={tmp_path / 'config.py'}", "--device=l4", *flags])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        assert not printed.err
        return code, printed.out

    return plan


def test_a_run_that_fits_is_planned_stage_by_stage(plan):
    code, out = plan(GiB, "--efficiency=0.25")
    assert code == 0 and out.count("64 full") == 2  # of the tables of memory and of time
    assert "at 25% of peak arithmetic" in out and "NO" not in out
    assert "The schedule takes at least" in out and "device-hours" in out


def test_a_run_that_does_not_fit_exits_with_1_and_advises(plan, monkeypatch):
    # its compilations are tested in tests/planning
    monkeypatch.setattr(search, "room", lambda *_: (["memory.offload=True"], []))
    code, out = plan(100_000)
    assert code == 1 and "NO" in out
    assert "It does not fit. Compiled, and fits: memory.offload=True." in out
    assert "Weights and optimizer alone are" in out and "quantize the base" in out


def test_a_search_answers_in_one_sentence(plan, monkeypatch):
    answer = "The largest batch that fits is training.rows=3"
    monkeypatch.setattr(search, "largest_batch", lambda *_: (answer, []))
    code, out = plan(GiB, "--search=batch", "--host_gb=1")
    assert code == 0 and f"{answer}.\n" in out
    assert "The schedule takes" not in out


def test_a_wrong_device_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["--config=quickstart", "--device=h100"])
    error = capsys.readouterr().err
    assert "h100-80g" in error and error.count("\n") == 1
