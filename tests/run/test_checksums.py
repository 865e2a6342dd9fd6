"""A checksum covers every byte of an array, however it is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lljax.parallel.sharding import make_mesh
from lljax.run.checksums import checksum, describe


@pytest.fixture
def items():
    rows = NamedSharding(make_mesh(fsdp=8), PartitionSpec(None, "fsdp"))
    return {
        "a": jax.device_put(jax.random.normal(jax.random.key(0), (3, 8, 4)), rows),
        "norm": jnp.array([0.0, -0.0, 1e-40, 3.0], jnp.bfloat16),
        "step": jnp.int32(3),
    }


def test_an_array_gathered_in_slices_has_the_checksum_of_the_whole(items):
    assert describe(items, gathered=50) == describe(items)


def test_sharding_does_not_count_and_every_element_does(items):
    whole = describe(items)
    assert describe(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), items)) == whole
    assert whole["['a']"][:2] == [[3, 8, 4], "float32"]
    for name, x in items.items():
        for i in range(x.size):
            flat = np.array(x).reshape(-1)
            flat[i] += 1
            assert describe({name: jnp.asarray(flat.reshape(x.shape))}) != {
                key: value for key, value in whole.items() if name in key
            }


def test_a_note_has_the_same_checksum_after_it_is_read():
    assert checksum({"a": 1, "b": [2.5]}) == checksum({"b": [2.5], "a": 1})
    assert checksum({"a": 1}) != checksum({"a": 2})
