"""The searches, over a planner that knows the answer: nothing is compiled."""

import dataclasses
import types

import pytest

from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.hardware.chips import GiB
from lljax.hardware.targets import sized, target
from lljax.planning import search
from lljax.planning.fit import Need
from lljax.planning.plan import Options
from lljax.training.curriculum import stages

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def config(length=4096):
    c = default_config()
    c.context.length, c.context.schedule, c.mesh.fsdp, c.mesh.sequence = (
        length,
        ((1, length, "full"),),
        1,
        -1,
    )
    return c


@pytest.fixture
def compiled(monkeypatch):
    """Stands for the compiler: a stage needs as many GiB as `compiled.need(config, target, stage)`
    says. Lists what was compiled.
    """
    seen = types.SimpleNamespace(need=None, base=0, calls=[], host=lambda config, stage: 0)

    def plan_stage(config, hf_config, target, stage, options, *, label=""):
        size = seen.need(config, target, stage)
        seen.calls.append(label or stage.length)
        need = Need(
            label,
            "none",
            int(seen.base * GiB),
            0,
            0,
            0,
            int(size * GiB),
            int(seen.host(config, stage) * GiB),
            True,
        )
        fits = need.fits(target.device.memory, options.room(target)[1])
        return types.SimpleNamespace(stage=stage, need=need, needs=[need], fits=fits)

    monkeypatch.setattr(search, "plan_stage", plan_stage)
    monkeypatch.setattr(
        search,
        "mesh_of",
        lambda mesh, devices: types.SimpleNamespace(
            shape={"data": 1, "fsdp": 1, "expert": 1, "sequence": 3, "tensor": 1}
        ),
    )
    monkeypatch.setattr("lljax.hardware.targets.Target.devices", lambda self: [])
    return seen


def test_a_length_that_does_not_fit_is_no_bound(compiled):
    compiled.need = lambda config, target, stage: (
        80 if 78_000 < stage.length < 88_000 or stage.length > 100_000 else 10
    )
    answer, plans = search.longest_context(config(40_000), CONFIG, target("h100-80g"), Options())
    best = max(p.stage.length for p in plans if p.fits)
    assert 94_000 < best <= 100_000 and f"is {best:,} tokens, though 79,992 and " in answer
    assert [p.fits for p in plans if p.stage.length > best] == [False] * 3


@pytest.mark.parametrize("limit", [700, 4096, 100_000])
def test_the_longest_context_is_compiled_and_so_is_one_that_does_not_fit(compiled, limit):
    compiled.need = lambda config, target, stage: 79 * stage.length / limit
    answer, plans = search.longest_context(config(), CONFIG, target("h100-80g"), Options())
    found = [p.stage.length for p in plans if p.fits][-1]
    above = [p.stage.length for p in plans if not p.fits][0]
    assert (
        f"{found:,}" in answer
        and found % 6 == 0
        and limit / 1.07 - 6 < found <= limit < above <= found * 1.07 + 6
    )


def test_the_largest_batch_is_exact(compiled):
    compiled.need = lambda config, target, stage: 10 * config.training.rows
    answer, plans = search.largest_batch(config(), CONFIG, target("h100-80g"), Options())
    assert answer.endswith("rows=7") and [p.fits for p in plans][-2:] in (
        [True, False],
        [False, False],
    )
    assert any("8 rows" in label for label in compiled.calls)


def test_the_fewest_devices_come_after_too_few(compiled):
    compiled.need = lambda config, target, stage: 60 / target.count
    answer, plans = search.fewest_devices(config(), CONFIG, target("v5e-1"), Options())
    assert answer.endswith("v5e-4") and [p.fits for p in plans] == [False, True]
    compiled.need = lambda config, target, stage: 1000
    with pytest.raises(ConfigError, match="no number of h100-80g fits"):
        search.fewest_devices(config(), CONFIG, target("h100-80g"), Options())


def test_room_compiles_settings_and_names_the_cheapest_first(compiled):
    def need(config, target, stage):
        m = config.memory
        return 100 - 15 * (m.tile > 0) - 25 * m.offload - 30 * (m.layers_per_residual > 1)

    compiled.need = need
    found, plans = search.room(config(), CONFIG, target("h100-80g"), worst(100), Options())
    assert found == [
        "memory.offload=True",
        "memory.layers_per_residual=2",
        "memory.tile=4096 memory.offload=True memory.layers_per_residual=4",
    ]
    assert len(plans) <= search.MOST_TRIES


def test_room_for_a_base_that_exceeds_the_device_is_more_devices(compiled):
    compiled.need = lambda config, target, stage: 60 / target.count
    found, plans = search.room(config(), CONFIG, target("v5e-1"), worst(60, base=50), Options())
    assert [name.split()[0] for name in found] == [
        "--device=v5e-4",
        "--device=v5e-4",
        "--device=v5e-8",
    ]
    compiled.need = lambda config, target, stage: 1000
    assert search.room(config(), CONFIG, target("v5e-1"), worst(1000, base=50), Options())[0] == []


def test_room_on_the_host_is_fewer_residuals_or_none_there(compiled):
    compiled.need = lambda config, target, stage: 40
    compiled.host = lambda config, stage: (
        400 * config.memory.offload / config.memory.layers_per_residual
    )
    changed = config()
    changed.memory.offload = True
    found, _ = search.room(changed, CONFIG, target("h100-80g"), worst(40, host=400), Options())
    assert found == [
        "memory.layers_per_residual=4",
        "memory.offload=False",
        "memory.layers_per_residual=4 memory.offload=False",
    ]


def test_room_for_a_rollout_is_a_smaller_cache_and_then_more_devices(compiled):
    compiled.need = lambda config, target, stage: (
        (100 - 30 * (config.rollout.cache == "int8")) / target.count
    )
    changed = config()
    changed.objective.name, changed.mesh.sequence = "grpo", 1
    refused = worst(40)
    writing = dataclasses.replace(refused.need, peak=100 * GiB, writes=True)
    refused.needs = [refused.need, writing]
    found, _ = search.room(changed, CONFIG, target("h100-80g"), refused, Options())
    assert found[0] == "rollout.cache='int8'" and not any("memory." in name for name in found)
    assert all("mesh.tensor=-1" in name for name in found[1:])
    assert not any("mesh.sequence" in name for name in found)


def worst(size, base=0, host=0):
    need = Need(
        "4,096 full", "none", int(base * GiB), 0, 0, 0, int(size * GiB), int(host * GiB), True
    )
    stage = stages(config().context)[0]
    return types.SimpleNamespace(stage=stage, need=need, needs=[need], fits=False)


def test_names_of_devices_read_back():
    for name in ("h100-80g:8", "v5e-8", "v5p-8", "v6e-1"):
        assert sized(target(name).device, target(name).count) == target(name)
