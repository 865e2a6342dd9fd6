import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.errors import ConfigError
from lljax.generation.sample import Sampling, sample_token

LOGITS = jnp.log(jnp.asarray([[0.05, 0.5, 0.15, 0.3], [0.4, 0.3, 0.2, 0.1]]))


def drawn(seen=None, **settings):
    """The tokens that each row ever gets."""
    sampling = Sampling(**{"temperature": 1.0} | settings)
    keys = jax.random.split(jax.random.key(0), (200, 2))
    tokens = jax.vmap(lambda keys: sample_token(LOGITS, keys, seen, sampling))(keys)
    return [set(np.unique(row).tolist()) for row in tokens.T]


@pytest.mark.parametrize(
    "settings,kept",
    [
        ({}, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        ({"temperature": 0.0}, [{1}, {0}]),
        ({"top_k": 2}, [{1, 3}, {0, 1}]),
        ({"top_p": 0.6}, [{1, 3}, {0, 1}]),
        ({"top_p": 1e-6}, [{1}, {0}]),
        ({"min_p": 0.35}, [{1, 3}, {0, 1, 2}]),
        ({"top_k": 3, "min_p": 0.7}, [{1}, {0, 1}]),
        ({"top_k": 2, "top_p": 0.55}, [{1}, {0}]),
    ],
)
def test_what_is_kept(settings, kept):
    assert drawn(**settings) == kept


def test_frequencies_are_the_probabilities():
    keys = jax.random.split(jax.random.key(1), 20_000)
    tokens = sample_token(jnp.tile(LOGITS[:1], (20_000, 1)), keys, None, Sampling(temperature=1.0))
    np.testing.assert_allclose(
        np.bincount(tokens, minlength=4) / 20_000, jnp.exp(LOGITS[0]), atol=0.015
    )


def test_repetition_lowers_what_was_seen_whatever_its_sign():
    seen = jnp.asarray([[False, True, False, False]] * 2)
    assert drawn(seen, temperature=0.0, repetition=3.0)[0] == {3}
    up = sample_token(
        LOGITS + 5, jax.random.split(jax.random.key(0), 2), seen, Sampling(repetition=1.5)
    )
    assert up.tolist() == [3, 0]


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition", 0.0),
        ("top_k", 2**31),
        ("seed", 2**63),
    ],
)
def test_a_value_out_of_range_is_one_line(name, value):
    with pytest.raises(ConfigError, match=f"sampling: {name}={value} must be"):
        Sampling(**{name: value})
