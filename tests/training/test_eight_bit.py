"""Moments of eight bits: what a code can hold, and Adam that walks where the one of 32 bits
does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lljax.training import eight_bit
from lljax.training.eight_bit import block, scale_by_adam_8bit

encode, decode = jax.jit(eight_bit.encode, static_argnums=1), jax.jit(eight_bit.decode)


@pytest.mark.parametrize(
    "dtype,codes", [(jnp.int8, np.arange(-127, 128)), (jnp.uint8, np.arange(256))]
)
def test_every_code_comes_back_as_it_was(dtype, codes):
    codes = jnp.asarray(np.resize(codes, (2, 512)), jnp.int32).astype(dtype)
    scale = jnp.array([[1.0, 3e-9], [7e4, 2.0]])
    again, scales = encode(decode(codes, scale), dtype)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(scales, scale, rtol=1e-6)


def test_values_keep_their_size_over_seven_decades_and_the_largest_is_exact():
    values = 10.0 ** np.linspace(-7.5, 0, 256, dtype=np.float32)
    got = np.asarray(decode(*encode(jnp.asarray(values), jnp.uint8)))
    assert got[-1] == pytest.approx(1.0, rel=1e-6)
    error = np.abs(got / values - 1)
    assert error[values > 0.1].max() < 0.04 and error[values > 1e-4].max() < 0.3
    signed = np.asarray(decode(*encode(jnp.asarray(-values), jnp.int8)))
    assert np.abs(signed / -values - 1)[values > 0.1].max() < 0.08


def test_a_second_moment_never_becomes_zero():
    x = jnp.array([1.0, 1e-12, 1e-30, 0.0])
    codes, scale = encode(x, jnp.uint8)
    assert codes.tolist()[1:] == [1, 1, 0] and decode(codes, scale)[1] > 1e-9
    # A weight whose gradient is a billionth of its neighbor's moves less than it would, not
    # without bound.
    adam = scale_by_adam_8bit(b1=0.9, b2=0.95, eps=1e-8)
    grads = {"w": jnp.array([1.0, 1e-9])}
    state = adam.init(grads)
    update = jax.jit(adam.update)
    for _ in range(5):
        updates, state = update(grads, state)
    assert jnp.abs(updates["w"]).max() < 1.5


@pytest.mark.parametrize("shape", [(3, 40, 512), (7,), (5, 1)])
def test_fifty_steps_stay_beside_those_of_32_bits(shape):
    def run(transformation):
        params, target = jnp.zeros(shape), jax.random.normal(jax.random.key(0), shape)
        state = transformation.init(params)

        @jax.jit
        def step(params, state, key):
            noise = 0.3 * jax.random.normal(key, shape)
            updates, state = transformation.update({"w": params - target + noise}, state)
            return params - 0.02 * updates["w"], state

        for i in range(50):
            params, state = step(params, state, jax.random.key(i))
        return params, state

    beside = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}

    def named(t):
        return optax.GradientTransformation(lambda p: t.init({"w": p}), t.update)

    (wanted, state_32), (got, state_8) = (
        run(named(optax.scale_by_adam(**beside))),
        run(named(scale_by_adam_8bit(**beside))),
    )
    assert jnp.abs(got - wanted).mean() < 0.02 * jnp.abs(wanted).mean()
    if shape[-1] >= 256:
        assert sum(x.nbytes for x in jax.tree.leaves(state_8)) < 0.26 * sum(
            x.nbytes for x in jax.tree.leaves(state_32)
        )


def test_blocks_divide_the_axis():
    assert [block(n) for n in (4096, 11008, 576, 48, 7, 257)] == [256, 256, 192, 48, 7, 1]
