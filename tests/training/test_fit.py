"""A run that cannot fit is refused before its weights are read."""

import logging

import jax
import pytest

from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.models.spec import LayerSpec
from lljax.sharding import make_mesh
from lljax.training import fit, loop


def need(**changes):
    sizes = dict.fromkeys(("base", "trainable", "optimizer", "temporary", "host"), 0)
    sizes |= {"label": "64 full", "context_parallel": "none", "peak": 3 * fit.GiB, "compiled": True}
    return fit.Need(**sizes | changes)


@pytest.mark.parametrize("changes,refuse,message", [
    ({}, True, r"stage 64 full needs 3.00 GiB of a device's memory and there are 2.00: set memory.tile=4096; "
     r"memory.offload=True; memory.layers_per_residual=2, .* memory.refuse=False"),
    ({}, False, None), ({"peak": fit.GiB}, True, None),
    ({"compiled": False}, False, r"needs 3.00 GiB of a device's"),
    ({"peak": fit.GiB, "host": 9 * fit.GiB}, True, r"needs 9.00 GiB of a host's memory and there are 4.00")])
def test_what_cannot_fit_is_one_line_with_advice(changes, refuse, message):
    config = default_config()
    config.memory.refuse = refuse
    if message is None:
        return fit.check([need(**changes)], 2 * fit.GiB, 4 * fit.GiB, config, (LayerSpec(),) * 4)
    with pytest.raises(ConfigError, match=message):
        fit.check([need(**changes)], 2 * fit.GiB, 4 * fit.GiB, config, (LayerSpec(),) * 4)


def test_a_refusal_of_the_tpu_compiler_is_read():
    class Step:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 23.61G of 15.75G hbm.")
    state = type("State", (), {"trainable": {}, "optimizer": {}})
    parts = type("Parts", (), {"step": Step(), "state": state, "frozen": {}})
    seen, program = fit.compile_step("64 full", parts, {}, None, None)
    assert program is None and not seen.fits(1e30, 1e30) and seen.peak == int(23.61 * fit.GiB)


def test_a_cpu_has_its_share_of_the_machine():
    memory, host = fit.capacity(make_mesh(fsdp=-1))
    assert memory == host and 2 ** 27 < memory < 2 ** 40


def test_the_loop_shows_the_plan_and_refuses_before_it_reads_weights(run_config, tmp_path, monkeypatch, caplog):
    run_config.context.schedule = ((4, 32, "full"),)
    monkeypatch.setattr(fit, "capacity", lambda mesh: (1000.0, 1e12))
    monkeypatch.setattr(loop, "fill", lambda *_: pytest.fail("weights were read"))
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="stage 32 full needs"):
        loop.train(run_config, tmp_path)
    assert "optimizer" in caplog.text and "NO" in caplog.text
