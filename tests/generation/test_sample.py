import jax.numpy as jnp
import numpy as np
import pytest

from lljax.generation import sample
from lljax.generation.sample import Sampling, generate
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.models.spec import from_hf


@pytest.fixture(scope="module")
def model():
    made = Decoder(from_hf({"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32,
                            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
                            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}))
    initialise(made, 0, deviation=0.3)
    return made


def test_cached_greedy_decoding_equals_reading_everything_again(model, monkeypatch):
    """Across the edges of prompt chunks, and beyond the original length of a RoPE that depends on the length."""
    monkeypatch.setattr(sample, "CHUNK", 16)
    prompt = list(np.random.default_rng(0).integers(0, 61, 37))
    got, row = list(generate(model, np.asarray(prompt), tokens=5)), list(prompt)
    for token in got:
        T = len(row)
        logits = model.logits(model(jnp.asarray([row]), positions=jnp.arange(T)[None], rope_length=42))[0, -1]
        assert int(jnp.argmax(logits)) == token
        row.append(token)


def test_sampling_follows_the_seed_and_top_p_keeps_the_likely(model):
    prompt = np.arange(10)

    def draw(**settings):
        return list(generate(model, prompt, tokens=6, sampling=Sampling(temperature=1.0, **settings)))
    assert draw(seed=1) == draw(seed=1)
    assert len({tuple(draw(seed=s)) for s in range(4)}) > 1
    assert draw(top_p=1e-6) == list(generate(model, prompt, tokens=6))


def test_stops_before_a_stop_token(model):
    whole = list(generate(model, np.arange(10), tokens=6))
    assert list(generate(model, np.arange(10), tokens=6, stop=frozenset({whole[2]}))) == whole[:whole.index(whole[2])]
