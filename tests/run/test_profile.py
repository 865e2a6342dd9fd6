"""The breakdown of a traced step, for intervals made by hand and for a real run."""

import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from run.cases import run_info

from lljax.errors import ConfigError
from lljax.hardware.chips import DEVICES
from lljax.parallel.sharding import make_mesh, replicated
from lljax.report.breakdown import COLLECTIVE, NO_WORK, divide, merged
from lljax.report.records import read_metrics
from lljax.run import loop
from lljax.run.profile import Tracer, mark_data, mark_step, read_steps


@pytest.mark.parametrize("text", ["3", "3:3", "5:2", "0:2", "a:b", "-1:4", "1:2:3", ""])
def test_malformed_steps_are_refused(text):
    with pytest.raises(ConfigError, match=f"--profile_steps={text}: .*20:23"):
        read_steps(text)


def test_steps_are_those_before_the_second_number():
    assert list(read_steps("20:23")) == [20, 21, 22] and read_steps(None) is None


def test_a_step_is_divided_without_counting_anything_twice():
    work, waits = merged([(0, 40), (10, 50)]), merged([(40, 70), (200, 300)])
    parts = divide({7: (0, 100)}, merged([(60, 90)]), {"a": (work, waits)})
    assert (parts.computing, parts.collectives, parts.data, parts.hidden) == pytest.approx(
        (50e-9, 20e-9, 20e-9, 10e-9)
    )
    assert parts.parts()["rest"] == pytest.approx(10e-9) and parts.steps == [7]
    both = divide({7: (0, 100), 8: (200, 300)}, [], {"a": (work, waits), "b": ([], [])})
    assert both.seconds == pytest.approx(100e-9) and both.devices == 2
    assert both.computing == pytest.approx(12.5e-9) and both.collectives == pytest.approx(
        (20 + 100) / 4 * 1e-9
    )


def test_a_trace_without_such_steps_says_nothing():
    assert divide({}, [], {"a": ([(0, 1)], [])}) is None and divide({1: (0, 1)}, [], {}) is None


@pytest.mark.parametrize(
    "name",
    [
        "all-gather",
        "all-gather-start.3",
        "%all-reduce.5 = f32[8] all-reduce(%x)",
        "psum.15",
        "ppermute.2",
        "all_to_all.1",
        "async-collective-done.4",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "reduce-scatter.1",
    ],
)
def test_collectives_are_told_by_their_names(name):
    assert COLLECTIVE.match(name)


def test_what_holds_others_is_no_work_of_its_own():
    for name in (
        "while.3",
        "%while.3 = (s32[]) while(%t)",
        "call",
        "conditional.1",
        "copy-start.8",
        "MemcpyH2D",
    ):
        assert NO_WORK.match(name)
    for name in (
        "fusion.3",
        "custom-call.2",
        "copy.1",
        "call_fusion",
        "multiply_reduce_fusion",
        "reduce.4",
        "gemm_fusion",
    ):
        assert not NO_WORK.match(name) and not COLLECTIVE.match(name)


def test_a_trace_of_a_program_with_collectives_is_read(tmp_path):
    mesh = make_mesh(fsdp=8)
    x = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, PartitionSpec("fsdp")))
    f = jax.jit(lambda x: x @ jax.lax.with_sharding_constraint(x, replicated(mesh)))
    tracer = Tracer()
    tracer.open(run_info(tmp_path, profile_steps=range(1, 3)))
    for number in (1, 2):
        tracer.begin(number)
        with mark_step(number):
            jax.block_until_ready(f(x))
            with mark_data():
                time.sleep(0.05)
        tracer.step({"step": number})
    parts = json.loads((tmp_path / "profile.json").read_text())
    assert parts["steps"] == [1, 2] and parts["devices"] == 8
    assert (
        parts["computing"] > 0
        and parts["collectives"] > 0
        and 0.04 < parts["data"] < parts["seconds"]
    )


@pytest.mark.slow
def test_a_run_is_traced_timed_and_told(run_config, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(DEVICES, "l4", dataclasses.replace(DEVICES["l4"], kinds=("cpu",)))
    run_config.context.schedule, run_config.data.valid_fraction = ((3, 32, "full"),), 0.0
    with caplog.at_level("INFO"):
        loop.train(run_config, tmp_path, profile_steps=range(2, 4))
    parts = json.loads((tmp_path / "profile.json").read_text())
    assert parts["steps"] == [2, 3] and parts["devices"] == len(jax.devices())
    assert 0 < parts["computing"] < parts["seconds"] and parts["collectives"] > 0
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))
    assert "computing" in caplog.text and "tensorboard --logdir" in caplog.text

    steps = read_metrics(tmp_path)
    assert all(0 <= record["data_seconds"] <= record["seconds"] for record in steps)
    work = {
        round(record["mfu"] * record["seconds"] * len(jax.devices()) * DEVICES["l4"].flops)
        for record in steps
    }
    assert len(work) == 1 and work.pop() > 0
    text = (tmp_path / "report.html").read_text()
    for text_of in (
        "Where the time goes",
        "steps 2 to 3",
        'class="part0"',
        "Model FLOPs utili",
        "<dt>MFU</dt>",
    ):
        assert text_of in text, text_of


def test_a_run_that_ends_among_the_steps_closes_its_trace(tmp_path):
    tracer = Tracer()
    tracer.open(run_info(tmp_path, profile_steps=range(1, 9)))
    tracer.begin(1)
    with mark_step(1):
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    tracer.step({"step": 1})
    tracer.close(None)
    assert list(tmp_path.rglob("*.xplane.pb")) and not (tmp_path / "profile.json").exists()


def test_steps_beyond_the_run_are_refused_and_past_ones_reported(run_config, tmp_path, caplog):
    with pytest.raises(ConfigError, match="--profile_steps=7:10: the run ends after step 8"):
        loop.train(run_config, tmp_path, profile_steps=range(7, 10))
    assert not os.listdir(tmp_path)
    Tracer().open(run_info(tmp_path, step=3, profile_steps=range(2, 4)))
    assert "nothing to trace" in caplog.text
