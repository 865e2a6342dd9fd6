"""The table of chips is complete, and JAX's names lead to one chip each."""

import pytest

from lljax.hardware.chips import DEVICES, of_kind


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_row_is_a_gpu_or_is_rented_in_slices(device):
    assert device.platform in ("cuda", "tpu") and device.kinds
    assert (device.gpu is None) == (device.platform == "tpu") == (device.slices is not None)
    assert 0 < device.link < device.bandwidth < device.flops and device.memory < 2 * device.host
    assert hash(device) is not None  # part of keys of caches


def test_jaxs_names_are_unique_and_lead_to_their_chip():
    kinds = [kind for device in DEVICES.values() for kind in device.kinds]
    assert len(kinds) == len({*kinds})
    assert of_kind("NVIDIA A100 80GB PCIe") is DEVICES["a100-80g"]
    assert of_kind("TPU v5 lite") is DEVICES["v5e"]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA A10G", "cpu"])
def test_a_chip_with_another_peak_is_unknown(kind):
    assert of_kind(kind) is None


def test_8_bit_products_are_faster_from_ada_on():
    assert {name for name, device in DEVICES.items() if device.fp8} == {
        *("h100-80g", "h200", "b200", "l4", "rtx4090", "rtx4080-16g", "rtx4060-8g")
    }
