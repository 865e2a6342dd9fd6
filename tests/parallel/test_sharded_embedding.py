"""A sharded embedding gives the rows of the whole table, and gets the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.parallel import sharded_embedding
from lljax.parallel.sharding import Layout, make_mesh


@pytest.mark.sample(3)
@pytest.mark.parametrize("mesh", [None, {"sequence": 8}, {"data": 2, "sequence": 2, "tensor": 2}])
# does not divide by the devices; fewer rows than devices
@pytest.mark.parametrize("V", [61, 5])
def test_lookup_equals_the_rows_of_the_table(monkeypatch, mesh, V):
    monkeypatch.setattr(sharded_embedding, "CHUNK", 24)  # tokens of a device are no multiple of it
    layout = None if mesh is None else Layout(make_mesh(**mesh), "halo")
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V, 12)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (2, 160)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(2, 160, 12)), jnp.float32)

    def of(lookup):
        return jax.jit(jax.value_and_grad(lambda table: jnp.sum(lookup(table) * weights)))(table)

    got = of(
        lambda table: sharded_embedding.lookup(table, tokens, dtype=jnp.float32, layout=layout)
    )
    wanted = of(lambda table: table[tokens])
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
