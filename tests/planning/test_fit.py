"""A run that cannot fit is refused before its weights are read."""

import dataclasses
import logging
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest

from lljax.attention.pattern import FULL
from lljax.config import default_config
from lljax.errors import ConfigError, OutOfMemory
from lljax.models.spec import LayerSpec
from lljax.parallel.sharding import make_mesh
from lljax.planning import fit
from lljax.run import loop
from lljax.training.curriculum import stages
from lljax.training.prepare import Program


def need(**changes):
    sizes = dict.fromkeys(("base", "trainable", "optimizer", "temporary", "host"), 0)
    sizes |= {"label": "64 full", "context_parallel": "none", "peak": 3 * fit.GiB, "compiled": True}
    return fit.Need(**sizes | changes)


@pytest.mark.parametrize(
    "changes,refuse,message",
    [
        (
            {},
            True,
            r"does not fit: 64 full needs 3.00 GiB of a device's memory and there are 2.00: set "
            r"memory.tile=4096; memory.offload=True; memory.layers_per_residual=2, .* "
            r"memory.refuse=False",
        ),
        ({}, False, None),
        ({"peak": fit.GiB}, True, None),
        ({"compiled": False}, False, r"needs 3.00 GiB of a device's"),
        (
            {"peak": fit.GiB, "host": 9 * fit.GiB},
            True,
            r"needs 9.00 GiB of host memory for residuals and a device can have "
            r"4.00 \(on a GPU no more than XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB\): set "
            r"memory.layers_per_residual=2; memory.layers_per_residual=4; "
            r"memory.offload=False, or spread it",
        ),
    ],
)
def test_what_cannot_fit_is_one_line_with_advice(changes, refuse, message):
    config = default_config()
    config.memory.refuse = refuse
    if message is None:
        return fit.check([need(**changes)], 2 * fit.GiB, 4 * fit.GiB, config, (LayerSpec(),) * 4)
    with pytest.raises(ConfigError, match=message):
        fit.check([need(**changes)], 2 * fit.GiB, 4 * fit.GiB, config, (LayerSpec(),) * 4)


def refused_program(trains: bool) -> Program:
    def lower():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 23.61G of 15.75G hbm."
        )

    return Program(
        label="64 full",
        pattern=FULL,
        layout=None,
        reason="one device",
        length=64,
        batch={},
        trains=trains,
        lower=lower,
    )


@pytest.mark.parametrize("trains", [True, False], ids=["step", "evaluation"])
def test_a_refusal_of_the_tpu_compiler_is_read(trains):
    """It knows the arguments of the program; the optimizer is none of an evaluation."""
    moments = jax.device_put(np.zeros(1024, np.float32), jax.devices()[0])
    state = types.SimpleNamespace(trainable={}, optimizer={"mu": moments})
    prepared = types.SimpleNamespace(state=state, frozen={}, keeps_reference=False)
    need = fit.need_of(refused_program(trains), prepared)
    assert not need.compiled and not need.fits(1e30, 1e30)
    assert need.peak == int(23.61 * fit.GiB) + (0 if trains else 4096)


def test_a_cpu_has_its_share_of_the_machine():
    memory, host = fit.capacity(make_mesh(fsdp=-1))
    assert memory == host and 2**27 < memory < 2**40


def test_the_loop_shows_the_plan_and_refuses_before_it_reads_weights(
    run_config, tmp_path, monkeypatch, caplog
):
    run_config.context.schedule = ((4, 32, "full"),)
    monkeypatch.setattr(fit, "capacity", lambda mesh: (1000.0, 1e12))
    monkeypatch.setattr(
        "lljax.build.load_weights", lambda *_, **__: pytest.fail("weights were read")
    )
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="32 full needs"):
        loop.train(run_config, tmp_path)
    assert "optimizer" in caplog.text and "NO" in caplog.text


def test_what_the_pool_of_a_gpu_has_given_before_counts():
    needs = [need(label="short", host=33 * fit.GiB), need(label="long", host=70 * fit.GiB)]
    assert fit.with_pool(needs, "tpu", 1e12) == needs
    assert [n.host // fit.GiB for n in fit.with_pool(needs, "gpu", 107 * fit.GiB)] == [33, 134]
    with pytest.raises(
        ConfigError,
        match="long needs 134.00 GiB of host memory for residuals and a device can have 107.00",
    ):
        fit.check(
            fit.with_pool(needs, "gpu", 107 * fit.GiB),
            4 * fit.GiB,
            107 * fit.GiB,
            default_config(),
            (LayerSpec(),) * 4,
        )


@pytest.mark.parametrize(
    "held_out,every,lengths",
    [
        (0.1, 0, [64]),
        (0.0, 3, []),
        (0.1, 4, [32, 64]),
        (0.1, 5, [48, 64]),
        (0.1, 6, [48, 64]),
        (0.1, 100, [64]),
    ],
)
def test_a_run_evaluates_on_rows_of_its_stages(held_out, every, lengths):
    config = default_config()
    config.data.valid_fraction, config.training.eval_every = held_out, every
    config.context.schedule = ((4, 32, "full"), (7, 48, "full"), (7 + 1, 64, "full"))
    assert fit.evaluation_lengths(config, stages(config.context)) == lengths
    assert fit.evaluation_lengths(config, ()) == []


def full(*_, **__):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 34359738368 bytes.\nmore\nlines"
    )


@dataclasses.dataclass
class Full:
    """A compiled program that finds no memory when it runs."""

    memory_analysis: Callable

    def __call__(self, *_):
        full()


def test_a_device_that_runs_out_of_memory_is_one_line_and_another_failure_is_left_as_it_is():
    for saved, told in (
        (lambda: None, "no checkpoint is there yet"),
        (lambda: 3, "the last checkpoint is of step 3"),
    ):
        with (
            pytest.raises(
                OutOfMemory, match=f"a step: .*34359738368 bytes.*: a way out; {told}"
            ) as raised,
            fit.explain_out_of_memory("a step", "a way out", saved),
        ):
            full()
        assert raised.value.exit_code == 71 and "\n" not in str(raised.value)
    with (
        pytest.raises(
            OutOfMemory,
            match="a step: the host is out of memory for residuals .*: raise XLA_PJRT_GPU_HOST_",
        ),
        fit.explain_out_of_memory("a step", "a way out", lambda: None),
    ):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 96.00GiB with "
            "allocator xla_gpu_host_bfc on device 0."
        )
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        fit.explain_out_of_memory("a step", "rest", lambda: None),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")


def test_advice_is_a_sentence_where_no_setting_is_left():
    config = default_config()
    assert fit.advice(config, (LayerSpec(),) * 4).startswith(
        "set memory.tile=4096; memory.offload=True; memory.layers_per"
    )
    config.memory.tile, config.memory.offload, config.memory.layers_per_residual = 64, True, 4
    assert fit.advice(config, (LayerSpec(),) * 4) == "spread it over more devices"


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing,told",
    [
        ("weights", "reading the weights: .*: spread them .*; no checkpoint is there yet"),
        (
            "64 full",
            "step 5, stage 64 full: .*: set memory.tile=4096; memory.offload=True; "
            "memory.layers_per_residual=2, or .*; the last checkpoint is of step 3, and the "
            "settings of memory and mesh may change",
        ),
        (
            "evaluation of 64",
            "evaluation of 64 tokens after step 5: .*: lower memory.loss_chunk.* is of step 3",
        ),
    ],
    ids=["weights", "step", "evaluation"],
)
def test_a_run_that_runs_out_of_memory_says_where_and_what_is_saved(
    run_config, train_on_one_device, tmp_path, monkeypatch, failing, told
):
    compile_program = Program.compile

    def compiled(program):
        out = compile_program(program)
        if program.label == failing:
            return Full(out.memory_analysis)
        return out

    monkeypatch.setattr(Program, "compile", compiled)
    if failing == "weights":
        monkeypatch.setattr("lljax.build.load_weights", full)
    run_config.context.schedule = ((4, 32, "shifted"), (5, 64, "full"))
    with pytest.raises(OutOfMemory, match=told):
        train_on_one_device(run_config, tmp_path)
