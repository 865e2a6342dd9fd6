import numpy as np
import pytest

from lljax.models.adapter_init import first_factors

RNG = np.random.default_rng(0)
U, V = (np.linalg.qr(RNG.normal(size=(n, 20)))[0] for n in (30, 20))
# [30, 20] with singular values 1, 1/2, 1/4 ...
WEIGHT = (U * 2.0 ** -np.arange(20) @ V.T).astype(np.float32)


def coarse(weight):
    return np.round(weight * 8) / 8


def factors(init, rank=4, scale=2.0, seed=0, name="q", weight=WEIGHT):
    return first_factors(
        weight, init=init, rank=rank, scale=scale, seed=seed, name=name, quantized=coarse
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_holds_the_largest_singular_values_in_equal_parts(init):
    (a, b), taken = factors(init)
    assert taken[0] is a and taken[1] is b
    np.testing.assert_allclose(2 * b @ a, U[:, :4] * 2.0 ** -np.arange(4) @ V.T[:4], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)


def test_olora_is_the_first_part_of_the_qr_decomposition():
    (a, b), _ = factors("olora")
    q, r = np.linalg.qr(WEIGHT)
    np.testing.assert_allclose(b, q[:, :4], atol=1e-5)
    np.testing.assert_allclose(a, r[:4], atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1", "olora", "loftq"])
def test_the_factors_are_the_same_every_time(init):
    for one, other in zip(factors(init)[0], factors(init)[0], strict=True):
        assert one.dtype == np.float32 and one.tobytes() == other.tobytes()


def test_the_random_vectors_follow_the_seed_and_the_name():
    weight = RNG.normal(size=(30, 20))
    (first, _), _ = factors("pissa_niter_1", weight=weight)
    for other in (dict(seed=1), dict(name="k")):
        assert np.any(factors("pissa_niter_1", weight=weight, **other)[0][0] != first)


def test_loftq_is_closer_to_the_weight_than_quantizing_is():
    weight = RNG.normal(size=(30, 20)).astype(np.float32)
    (a, b), (taken_a, taken_b) = factors("loftq", rank=8, weight=weight)

    def error(value):
        return np.linalg.norm(value - weight)

    assert error(coarse(weight - 2 * taken_b @ taken_a) + 2 * b @ a) < 0.8 * error(coarse(weight))
