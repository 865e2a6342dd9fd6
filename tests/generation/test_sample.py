import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.errors import ConfigError
from lljax.generation.sample import Sampling, sample_tokens, samplers_of

LOGITS = jnp.log(jnp.asarray([[0.05, 0.5, 0.15, 0.3], [0.4, 0.3, 0.2, 0.1]]))


def samplers(logits, seed=0, seen=None, **settings):
    """Rows with keys of their own."""
    rows = samplers_of(Sampling(**settings), (), [], logits.shape[1], len(logits))
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), len(logits)))
    rows = dataclasses.replace(rows, key=keys, seen=rows.seen if seen is None else seen)
    return jax.tree.map(jnp.asarray, rows)


def drawn(seen=None, **settings):
    """The tokens that each row ever gets."""
    logits = jnp.repeat(LOGITS, 200, axis=0)
    seen = None if seen is None else jnp.repeat(seen, 200, axis=0)
    tokens, _ = sample_tokens(
        logits, samplers(logits, seen=seen, **{"temperature": 1.0} | settings)
    )
    return [set(np.unique(row).tolist()) for row in np.asarray(tokens).reshape(2, 200)]


@pytest.mark.parametrize(
    "settings,kept",
    [
        ({}, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        ({"temperature": 0.0}, [{1}, {0}]),
        ({"top_k": 2}, [{1, 3}, {0, 1}]),
        ({"top_p": 0.6}, [{1, 3}, {0, 1}]),
        ({"top_p": 1e-6}, [{1}, {0}]),
        ({"top_p": 1e-46}, [{1}, {0}]),  # 0 in float32
        ({"min_p": 0.35}, [{1, 3}, {0, 1, 2}]),
        ({"top_k": 3, "min_p": 0.7}, [{1}, {0, 1}]),
        ({"top_k": 2, "top_p": 0.55}, [{1}, {0}]),
    ],
)
def test_what_is_kept(settings, kept):
    assert drawn(**settings) == kept


def test_frequencies_are_the_probabilities():
    logits = jnp.tile(LOGITS[:1], (20_000, 1))
    for settings in ({}, {"top_k": 4}):  # with and without a filter, the same draws
        tokens, _ = sample_tokens(logits, samplers(logits, 1, temperature=1.0, **settings))
        share = np.bincount(tokens, minlength=4) / 20_000
        np.testing.assert_allclose(share, jnp.exp(LOGITS[0]), atol=0.015)


def test_each_row_has_its_own_sampling():
    logits = jnp.tile(LOGITS[:1], (300, 1))
    rows = samplers(logits, temperature=1.0)
    mixed = dataclasses.replace(
        rows,
        temperature=rows.temperature.at[:100].set(0),
        top_k=rows.top_k.at[200:].set(2),
    )
    (alone, _), (tokens, after) = sample_tokens(logits, rows), sample_tokens(logits, mixed)
    assert set(tokens[:100].tolist()) == {1} and set(tokens[200:].tolist()) == {1, 3}
    np.testing.assert_array_equal(tokens[100:200], alone[100:200])
    assert set(after.drawn.tolist()) == {1} and bool(after.seen[5, 1])
    assert sample_tokens(logits, after)[0].tolist() != tokens.tolist()


def test_repetition_lowers_what_was_seen_whatever_its_sign():
    seen = jnp.asarray([[False, True, False, False]] * 2)
    assert drawn(seen, temperature=0.0, repetition=3.0)[0] == {3}
    up, _ = sample_tokens(LOGITS + 5, samplers(LOGITS, seen=seen, repetition=1.5))
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
