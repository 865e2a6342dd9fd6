import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.errors import DataError
from lljax.evaluation import perplexity as module
from lljax.evaluation.perplexity import (
    longlora_windows,
    new_token_windows,
    perplexity,
    predicted,
    read,
    window_perplexity,
)
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.task import TooShort
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize


@pytest.fixture(scope="module")
def model():
    made = Decoder(
        spec_from_hf(
            {
                "model_type": "llama",
                "vocab_size": 30,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        )
    )
    initialize(made, 0, deviation=0.5)
    return made


@pytest.fixture(scope="module")
def losses_of(model):
    """The cross-entropy of each token of a text but its first, given those before it."""
    graphdef, state = nnx.split(model)
    read = jax.jit(
        lambda state, tokens: jax.nn.log_softmax(
            (made := nnx.merge(graphdef, state)).logits(
                made(tokens[None], positions=jnp.arange(len(tokens))[None])
            )
        )
    )

    def losses(text):
        # one shape: what follows is not seen
        logs = np.asarray(read(state, np.pad(text, (0, 33 - len(text))))[0])
        return [-float(logs[i, token]) for i, token in enumerate(text[1:])]

    return losses


def test_every_length_predicts_the_same_tokens(model, losses_of):
    """Against the mean over windows written out; the last, incomplete window is left out."""
    texts = np.random.default_rng(0).integers(0, 30, size=(2, 33)).astype(np.int32)
    for length in (8, 32):
        pieces = [
            text[start : start + length + 1] for text in texts for start in range(0, 32, length)
        ]
        losses = [loss for piece in pieces for loss in losses_of(piece)]
        assert len(losses) == 64
        np.testing.assert_allclose(
            perplexity(model, texts, length), np.exp(np.mean(losses)), rtol=1e-4
        )


def test_longloras_protocol_is_that_of_its_eval_py(model, losses_of):
    data, L, stride = np.random.default_rng(1).integers(0, 30, 75).astype(np.uint32), 16, 4
    starts = list(range(0, len(data) - L, stride))  # get_as_batch
    starts.pop()
    val_loss = np.mean([np.mean(losses_of(data[i : i + L])) for i in starts])
    texts = longlora_windows(data, L, 1000, stride)
    assert len(texts) == len(starts) == 14
    np.testing.assert_allclose(window_perplexity(model, texts, L - 1), 2.71828**val_loss, rtol=1e-4)
    few = longlora_windows(data, L, 3, stride)
    assert few.tolist() == texts[[0, 6, 13]].tolist()
    assert not len(longlora_windows(data, 75, 9, stride))


def test_new_tokens_are_counted_once_and_are_the_same_at_every_length(model, losses_of):
    data, stride = np.random.default_rng(2).integers(0, 30, 75).astype(np.uint32), 4
    for length in (8, 32):
        losses, counted = [], []
        for end in range(32, 76, stride):
            losses += losses_of(data[end - length : end])[-stride:]
            counted += range(end - stride, end)
        texts = new_token_windows(data, length, 32, 1000, stride)
        assert counted == list(range(28, 72)) and len(texts) == 11
        np.testing.assert_allclose(
            window_perplexity(model, texts, stride), np.exp(np.mean(losses)), rtol=1e-4
        )
    with pytest.raises(TooShort, match="have no context"):
        new_token_windows(data, 4, 32, 9, stride)


def test_tokens_have_32_bits():
    assert longlora_windows(np.full(2000, 151_935, np.uint32), 512, 2).max() == 151_935


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_held_out_documents_that_is_the_reason(protocol):
    nothing = types.SimpleNamespace(lengths=np.zeros(0, int), stream=np.zeros(0, np.uint32))
    with pytest.raises(
        DataError, match="no document is held out: name JSONL files with --held_out"
    ):
        read(protocol, nothing, 512, 4096, 8)


def test_the_predicted_tokens_identify_the_texts_of_a_comparison():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 30, 900).astype(np.uint32) for _ in range(3)]
    store = types.SimpleNamespace(
        lengths=np.array([900] * 3), stream=np.concatenate(documents), tokens=documents.__getitem__
    )
    of = lambda protocol, length, longest: predicted(
        protocol, read(protocol, store, length, longest, 8)
    )
    for protocol in ("perplexity", "perplexity/new_tokens"):
        assert np.array_equal(of(protocol, 300, 600), of(protocol, 600, 600))
        assert not np.array_equal(of(protocol, 300, 600), of(protocol, 300, 800))
    assert of("perplexity/longlora", 300, 600) is None


def test_a_loss_beyond_a_float_is_an_infinite_perplexity(model, monkeypatch):
    monkeypatch.setattr(module, "_summed", lambda *_: 800.0 * 32)
    assert perplexity(model, np.zeros((1, 33), np.int32), 32) == np.inf
