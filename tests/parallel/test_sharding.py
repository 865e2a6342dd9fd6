"""Meshes that are refused. Training on a mesh: tests/training/test_parallel.py."""

import jax
import pytest

from lljax.errors import ConfigError
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import check_rows


@pytest.mark.parametrize(
    "sizes,devices,message",
    [
        (
            {"sequence": 4},
            1,
            "there is one device, and nothing to spread over.*sequence_parallel: true",
        ),
        ({"sequence": 3, "fsdp": -1}, 8, "the 8 devices here: 3 do not divide 8"),
        ({"sequence": 16}, 8, "16 do not divide 8"),
        ({"data": -1, "fsdp": -1}, 8, "exactly one of them to -1"),
        ({"data": 2}, 8, "exactly one of them to -1"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_say_why(sizes, devices, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**sizes, devices=jax.devices()[:devices])


def test_rows_that_do_not_spread_name_both_ways_out():
    with pytest.raises(
        ConfigError,
        match="training.rows=1 .*multiple such as 8, or .*mesh.fsdp=1 and mesh.sequence=-1",
    ):
        check_rows(1, make_mesh(fsdp=8, devices=jax.devices()))
