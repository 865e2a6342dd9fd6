import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.evaluation import likelihood
from lljax.evaluation.likelihood import log_likelihoods
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize

HF = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 4.0}])
def test_likelihoods_are_those_of_each_pair_read_alone(rope, monkeypatch):
    monkeypatch.setattr(likelihood, "MULTIPLE", 64)
    monkeypatch.setattr(likelihood, "CHUNK", 8)
    model = Decoder(spec_from_hf(HF | {"rope_scaling": rope}))
    initialize(model, 0, deviation=0.5)
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 30, n), rng.integers(0, 30, m))
        for n, m in ((3, 2), (30, 1), (1, 7), (20, 15), (5, 0))
    ]
    read = jax.jit(
        lambda tokens, n: jax.nn.log_softmax(
            model.logits(
                model(tokens[None], positions=jnp.arange(len(tokens))[None], rope_length=n)
            )[0]
        )
    )

    def logs(tokens):
        return np.asarray(read(np.pad(tokens, (0, 64 - len(tokens))), len(tokens)))

    context, continuation = pairs[0][0], []
    for _ in range(4):
        continuation.append(
            logs(np.append(context, continuation).astype(int))[
                len(context) + len(continuation) - 1
            ].argmax()
        )
    pairs.append((context, continuation))
    found = log_likelihoods(model, pairs, rows=4)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        each = logs(np.append(context, continuation[:-1]).astype(int))
        np.testing.assert_allclose(
            value,
            sum(each[len(context) - 1 + i, token] for i, token in enumerate(continuation)),
            rtol=1e-4,
            atol=1e-4,
        )
    # nothing is what greedy decoding writes, too
    assert [greedy for _, greedy in found[:5]] == [False] * 4 + [True]
    assert found[5][1] or rope  # angles that depend on the length change while the text grows
