"""Names of devices to compile for."""

import pytest

from lljax.errors import ConfigError
from lljax.hardware import targets
from lljax.hardware.chips import DEVICES
from lljax.hardware.targets import counts, sized, target


@pytest.mark.parametrize(
    "name,kind,count",
    [
        ("h100-80g", "h100-80g", 1),
        ("h100-80g:8", "h100-80g", 8),
        ("v5e-1", "v5e", 1),
        ("v6e-256", "v6e", 256),
        ("v5p-128", "v5p", 64),
    ],
)
def test_a_name_is_a_kind_and_a_number(name, kind, count):
    assert (target(name).device, target(name).count) == (DEVICES[kind], count)


@pytest.mark.parametrize(
    "name,message",
    [
        ("h100", "there are h100-80g, h200"),
        ("H100-80g", "there are h100-80g"),
        ("", "there are h100-80g"),
        ("v5e-3", "there is no such slice; there are v5e-1, v5e-4"),
        ("v5p-9", "there is no such slice; there are v5p-8, v5p-16"),
        ("v5p", "no such slice"),
    ],
)
def test_other_names_are_refused_with_the_legal_ones(name, message):
    with pytest.raises(ConfigError, match=message):
        target(name)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_size_is_read_back_from_its_name(device):
    for count in counts(device):
        assert target(sized(device, count).name) == sized(device, count)


def test_a_missing_compiler_is_one_line_with_the_way_to_get_it(monkeypatch):
    def fail(target):
        raise RuntimeError("no plugin\nmore")

    monkeypatch.setattr(targets, "_topology", fail)
    with pytest.raises(ConfigError, match=r"here \(no plugin\): pip install 'lljax\[plan-tpu\]'"):
        target("v5e-4").devices()


def test_the_gpu_of_a_target_is_described_by_its_row():
    text = targets._gpu_config(DEVICES["l4"])
    assert "major: 8 minor: 9" in text and 'device_description_str: "NVIDIA L4"' in text
