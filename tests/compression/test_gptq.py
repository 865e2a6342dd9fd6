"""The mathematics of rounding: to nearest, GPTQ and AWQ."""

import functools

import ml_dtypes
import numpy as np
import pytest

from lljax.compression import awq, gptq
from lljax.compression.rounding import output_error, over_inputs, round_to_nearest
from lljax.interop.layouts import Scheme

FLOAT32 = (np.dtype(np.float32),) * 2
SCHEMES = {
    "symmetric": Scheme(4, group=32),
    "with zero points": Scheme(4, group=32, symmetric=False),
    "one scale for each output": Scheme(4, group=-1),
    "eight bits": Scheme(8, group=64),
}


def settings(scheme, **changes):
    return {"scheme": scheme, "stored": FLOAT32, "search": False} | changes


@pytest.fixture(scope="module")
def layer():
    """A kernel [192, 40], and inputs [600, 192] that depend on each other."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((192, 40)).astype(np.float32)
    inputs = rng.standard_normal((600, 24)) @ rng.standard_normal((24, 192))
    inputs += 0.3 * rng.standard_normal((600, 192)) * np.exp(rng.standard_normal(192))
    return kernel, (inputs.T @ inputs).astype(np.float32)


def reference(kernel, gram, scheme, damp=0.01):
    """Algorithm 1 of the paper in float64 without blocks, inputs by decreasing size."""
    inputs = len(kernel)
    rounded = round_to_nearest(kernel, **settings(scheme))
    scale, zero = (np.asarray(over_inputs(x, inputs, scheme), np.float64) for x in rounded.grid)
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram.astype(np.float64) + damp * np.mean(np.diag(gram)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    weights, codes = kernel.astype(np.float64)[order], np.zeros(kernel.shape)
    for i, place in enumerate(order):
        code = np.clip(np.round(weights[i] / scale[place]) + zero[place], 0, 2**scheme.bits - 1)
        error = (weights[i] - (code - zero[place]) * scale[place]) / upper[i, i]
        weights[i:] -= np.outer(upper[i, i:], error)
        codes[place] = code
    return codes


@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_is_the_algorithm_of_the_paper(layer, name):
    kernel, gram = layer
    found = gptq.gptq(kernel, gram, **settings(SCHEMES[name]))
    wanted = reference(kernel, gram, SCHEMES[name])
    differs = np.abs(np.asarray(found.rounded.codes) - wanted)
    assert np.mean(differs > 0) < 0.03  # a weight halfway between codes may go either way
    assert found.damp == gptq.DAMPS[0]


@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_loses_less_than_rounding_to_nearest(layer, name):
    kernel, gram = layer
    how = settings(SCHEMES[name])
    errors = [
        float(output_error(kernel, rounded.dense(SCHEMES[name]), gram))
        for rounded in (gptq.gptq(kernel, gram, **how).rounded, round_to_nearest(kernel, **how))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_the_error_is_the_share_of_the_output_that_is_lost(layer):
    kernel, _ = layer
    inputs = np.random.default_rng(1).standard_normal((50, 192)).astype(np.float32)
    other = kernel + 0.1
    lost, all_of_it = inputs @ (other - kernel), inputs @ kernel
    assert float(output_error(kernel, other, inputs.T @ inputs)) == pytest.approx(
        (lost**2).sum() / (all_of_it**2).sum(), rel=1e-4
    )


def test_inputs_that_are_always_zero_get_zero_weights_and_disturb_no_other(layer):
    kernel, gram = layer
    alive = np.arange(192) % 32 >= 4
    without = gram * alive[:, None] * alive
    found = gptq.gptq(kernel, without, **settings(SCHEMES["symmetric"])).rounded
    dense = np.asarray(found.dense(SCHEMES["symmetric"]))
    assert (dense[~alive] == 0).all()
    assert float(output_error(kernel, dense, without)) < 0.05


def test_a_gram_matrix_of_rank_one_is_damped_and_an_empty_one_rounds_to_nearest(layer):
    kernel, _ = layer
    how = settings(SCHEMES["symmetric"])
    one = np.outer(np.arange(192.0), np.arange(192.0)).astype(np.float32)
    assert gptq.gptq(kernel, one, **how).damp in gptq.DAMPS
    for gram in (np.zeros_like(one), np.full_like(one, np.nan)):
        found = gptq.gptq(kernel, gram, **how)
        nearest = round_to_nearest(kernel, **how)
        assert found.damp is None
        assert np.array_equal(found.rounded.codes, nearest.codes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_codes_are_nearest_under_the_scale_that_is_stored(layer, dtype):
    kernel, _ = layer
    scheme, stored = SCHEMES["symmetric"], (np.dtype(dtype),) * 2
    rounded = round_to_nearest(kernel, scheme=scheme, stored=stored, search=False)
    scale = np.asarray(over_inputs(rounded.grid.scale, 192, scheme))
    assert np.array_equal(scale.astype(dtype).astype(np.float32), scale)
    inside = np.abs(kernel / scale) < 7.4
    assert (np.abs(np.asarray(rounded.dense(scheme)) - kernel) <= 0.5001 * scale)[inside].all()
    codes = rounded.to_codes(scheme, stored)
    assert codes.codes.shape == (40, 192) and codes.scale.dtype == dtype and codes.zero is None


def test_fp8_has_a_scale_for_each_output_and_loses_less_than_a_sixteenth(layer):
    kernel, _ = layer
    scheme = Scheme(8, kind="float", group=-1)
    rounded = round_to_nearest(kernel, **settings(scheme))
    assert rounded.grid.scale.shape == (1, 40)
    assert np.abs(np.asarray(rounded.dense(scheme)) - kernel).max() < np.abs(kernel).max() / 16
    codes = rounded.to_codes(scheme, FLOAT32)
    assert codes.codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.abs(codes.codes.astype(np.float32)).max() == 448


def test_a_search_of_scales_loses_less_than_the_largest_weight(layer):
    kernel, _ = layer
    scheme = SCHEMES["symmetric"]
    losses = [
        np.abs(
            np.asarray(round_to_nearest(kernel, **settings(scheme, search=search)).dense(scheme))
            - kernel
        )
        ** 2.4
        for search in (True, False)
    ]
    assert losses[0].sum() < 0.95 * losses[1].sum()


def test_zeros_and_tiny_weights_keep_finite_scales():
    kernel = np.zeros((64, 2), np.float32)
    kernel[:, 1] = 1e-9
    scheme, stored = Scheme(4, group=32), (np.dtype(np.float16),) * 2
    for search in (False, True):
        rounded = round_to_nearest(kernel, scheme=scheme, stored=stored, search=search)
        dense = np.asarray(rounded.dense(scheme))
        assert np.isfinite(dense).all() and np.abs(dense).max() <= 1e-3
        assert (np.asarray(rounded.grid.scale) > 0).all()


def test_awq_scales_lose_no_more_than_none_and_less_where_inputs_differ(layer):
    kernel, gram = layer
    loud = np.ones(192, np.float32)
    loud[[5, 70, 140]] = 30
    gram = gram * loud[:, None] * loud
    size = np.sqrt(np.diag(gram))
    how = settings(SCHEMES["with zero points"])
    s = np.asarray(awq.best_scales((kernel,), gram, size, **how))
    error = functools.partial(output_error, kernel, gram=gram)
    scaled = round_to_nearest(kernel * s[:, None], **how).dense(how["scheme"]) / s[:, None]
    plain = round_to_nearest(kernel, **how).dense(how["scheme"])
    assert float(error(scaled)) < 0.7 * float(error(plain))
    np.testing.assert_allclose(awq.best_scales((kernel,), gram, 7 * size, **how), s, rtol=1e-5)
