import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import our_logits

from lljax.build import load_base
from lljax.errors import ConfigError
from lljax.interop.open import open_base
from lljax.models import fp8
from lljax.models.families import spec_from_hf
from lljax.models.fp8 import fp8_dot

KEYS = jax.random.split(jax.random.key(0), 3)


def rounded(x, axis):
    """To e4m3 by tables of ml_dtypes, in numpy."""
    scale = np.abs(x).max(axis, keepdims=True) / 448
    return (x / np.where(scale == 0, 1, scale)).astype(jnp.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.sample(2)
@pytest.mark.parametrize("lead", [(7,), (2, 5)])
def test_product_and_gradient_are_those_of_rounded_values(lead):
    x = (
        np.asarray(jax.random.normal(KEYS[0], (*lead, 37)))
        * 10.0 ** np.arange(-3, lead[-1] - 3)[:, None]
    )
    x[..., 1, :] = 0  # a padded token
    kernel, dy = (
        np.array(jax.random.normal(KEYS[1], (37, 11))),
        np.asarray(jax.random.normal(KEYS[2], (*lead, 11))),
    )
    kernel[:, 3] = 0
    y, backward = jax.vjp(lambda x: fp8_dot(x, kernel), jnp.asarray(x, jnp.float32))
    size = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(
        y / size, rounded(np.float32(x), -1) @ rounded(kernel, 0) / size, rtol=2e-5, atol=1e-4
    )
    np.testing.assert_allclose(
        backward(dy)[0], rounded(dy, -1) @ rounded(kernel.T, 0), rtol=2e-5, atol=1e-4
    )


@pytest.mark.slow
def test_rounding_costs_a_few_hundredths_in_either_direction():
    x, kernel, dy = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(KEYS, ((64, 256), (256, 96), (64, 96)), strict=True)
    )
    y, backward = jax.vjp(lambda x: fp8_dot(x, kernel), x)
    assert y.dtype == jnp.bfloat16
    for ours, wanted in ((y, x @ kernel), (backward(dy)[0], dy @ kernel.T)):
        ours, wanted = ours.astype(jnp.float32), wanted.astype(jnp.float32)
        assert 0.005 < jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted) < 0.06


def test_a_chip_without_it_is_refused():
    fp8.check(["NVIDIA H100 80GB HBM3", "NVIDIA L4", "cpu"])
    with pytest.raises(
        ConfigError, match="model.matmul='fp8': NVIDIA A10 does not.*model.matmul='default'"
    ):
        fp8.check(["NVIDIA H100 80GB HBM3", "NVIDIA A10"])


def test_every_linear_layer_of_a_base_multiplies_so(tiny):
    base = open_base(str(tiny))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 24))
    default, rounded = (
        our_logits(load_base(base, spec_from_hf(base.config), jnp.float32, matmul=matmul), tokens)
        for matmul in ("default", "fp8")
    )
    assert 1e-3 < np.linalg.norm(rounded - default) / np.linalg.norm(default) < 0.2
