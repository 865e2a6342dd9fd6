import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.evaluation.perplexity import perplexity
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.models.spec import from_hf


def test_every_length_predicts_the_same_tokens():
    """Against the mean over windows written out; the last, incomplete window is left out."""
    model = Decoder(from_hf({"model_type": "llama", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 16,
                             "num_hidden_layers": 1, "num_attention_heads": 2}))
    initialise(model, 0, deviation=0.5)
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, inputs: (model := nnx.merge(graphdef, state)).logits(
        model(inputs[None], positions=jnp.arange(len(inputs))[None])))
    texts = np.random.default_rng(0).integers(0, 30, size=(2, 33)).astype(np.int32)
    for length in (8, 16, 32):
        losses = []
        for text in texts:
            for start in range(0, 32, length):
                inputs, targets = text[start:start + length], text[start + 1:start + length + 1]
                logs = jax.nn.log_softmax(logits(state, inputs))[0]
                losses += [-logs[i, t] for i, t in enumerate(targets)]
        assert len(losses) == 64
        np.testing.assert_allclose(perplexity(model, texts, length, chunk=7), np.exp(np.mean(losses)), rtol=1e-4)
