"""Attention beside a shared prompt is attention of rows that hold the prompt themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.attention import AttentionOptions, Mask, Trunk, attend, attend_forked, forked
from lljax.attention.mask import NEVER, of_keys

B, K, G, H = 3, 2, 3, 8
SLOTS, USED, OWN = 32, 21, 8  # of the prompt, taken ones of them, and of each row
READ = (5, 1, 8)  # own tokens of each row, the last being the query


def random(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def cut(kept, start, size):
    return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in kept)


@pytest.mark.sample(5)
@pytest.mark.parametrize("block", [4, 32], ids=["blocks", "whole"])
@pytest.mark.parametrize("window", [None, 3, 10, 27])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": random(9, K * G)}], ids=str)
def test_as_if_each_row_held_the_prompt(window, more, block, monkeypatch):
    """Slots of the prompt that are not taken hold large values, which nobody may see."""
    monkeypatch.setitem(forked.SCORE_BYTES_IN_PLACE, "cpu", 4 * B * K * G * block)
    q, k, v = random(0, B, 1, K * G, H), random(1, B, OWN, K, H), random(2, B, OWN, K, H)
    unused = jnp.where(jnp.arange(SLOTS) < USED, 0, 100)[:, None]
    trunk = tuple(random(3 + i, 1, K, SLOTS, H) + unused for i in range(2))
    places = jnp.arange(SLOTS)
    index = jnp.concatenate([jnp.where(places < USED, places, NEVER), USED + jnp.arange(OWN)])
    q_index = USED - 1 + jnp.asarray(READ)[:, None]
    mask = Mask(q_index, jnp.broadcast_to(index, (B, len(index))), window=window)
    options = AttentionOptions(scale=0.5, **more)

    def joined(own, shared):
        shared = jnp.broadcast_to(jnp.moveaxis(shared, 1, 2), (B, SLOTS, K, H))
        return jnp.concatenate([shared, own], axis=1)

    wanted = attend(q, joined(k, trunk[0]), joined(v, trunk[1]), mask, options)
    prompt = Trunk(
        kept=trunk,
        used=jnp.asarray([USED]),
        mask=of_keys(mask, lambda x: x[:, :SLOTS]),
        read=cut,
        in_place=True,
    )
    own = of_keys(mask, lambda x: x[:, SLOTS:])
    out = attend_forked(q, k, v, own, prompt, options)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
