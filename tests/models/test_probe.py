"""A zero beside a weight tells the gradient of the weight in a subspace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.models.grouped import grouped_dot
from lljax.models.probe import ProbedWeight, lookup_rows, multiply
from lljax.models.quantize import dense, integer_form, quantize
from lljax.objectives.token_loss import cross_entropy
from lljax.parallel.sharding import Layout, make_mesh

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "inputs,layout",
    [(True, None), (False, Layout(make_mesh(data=2, sequence=2, tensor=2), "ring"))],
)
def test_a_probe_tells_the_gradient_in_its_subspace(inputs, layout):
    """Of a kernel, of experts, of an embedding, and of a head in the loss: each against the
    gradient of the weight itself.
    """
    x, y = jax.random.normal(KEY, (2, 8, 6)), jax.random.normal(KEY, (2, 8, 10))
    tokens = jnp.array([[3, 3, 5, 0], [0, 5, 3, 3]])
    targets = jax.random.randint(KEY, (2, 8), 0, 6).at[0, 2].set(-100)

    def kernel(w):  # [6, 10]
        return jnp.sum(jnp.sin(multiply(x, w)) * y)

    def experts(w):  # two of the same
        w = jax.tree.map(lambda x: jnp.stack([x, x]), w)
        dot = functools.partial(grouped_dot, sizes=jnp.array([9, 7]), platform="cpu")
        return jnp.sum(jnp.sin(multiply(x.reshape(16, 6), w, dot)) * y.reshape(16, 10))

    def embedding(w):
        return jnp.sum(jnp.cos(lookup_rows(w, tokens, dtype=jnp.float32, layout=layout)) * y[:, :4])

    def head(w):
        return cross_entropy(y, w, targets, chunk=4, softcap=3.0, layout=layout)

    @jax.jit
    def both():
        base = quantize(jax.random.normal(KEY, (6, 10)), integer_form(8, 6), jnp.float32)
        n = 6 if inputs else 10
        projection = quantize(jax.random.normal(KEY, (n, 4)), integer_form(4, n), jnp.float32)
        zero = jnp.zeros((4, 10) if inputs else (6, 4))
        return dense(projection), [
            (
                jax.value_and_grad(f)(dense(base)),
                jax.value_and_grad(
                    lambda z, f=f: f(ProbedWeight(base, projection, z, inputs).dense(jnp.float32))
                )(zero),
            )
            for f in (kernel, experts, embedding, head)
        ]

    p, pairs = both()
    for (value, G), (again, got) in pairs:
        np.testing.assert_allclose(again, value, rtol=1e-5)
        np.testing.assert_allclose(got, p.T @ G if inputs else G @ p, atol=1e-4)
