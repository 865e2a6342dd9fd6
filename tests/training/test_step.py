"""What a step and an evaluation share."""

import jax
import numpy as np
from conftest import TINY
from flax import nnx

from lljax.attention.pattern import FULL
from lljax.config import default_config
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialise import initialise
from lljax.training.step import make_evaluate, step_settings

T = 1024


def test_an_evaluation_keeps_to_the_tile_and_finds_the_same():
    model = Decoder(spec_from_hf(TINY | {"intermediate_size": 1024}))
    initialise(model, 0, deviation=0.2)
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    c = default_config()
    c.model.dtype = "float32"
    tokens = np.random.default_rng(0).integers(0, 300, (1, T)).astype(np.int32)
    places = np.arange(T, dtype=np.int32)[None]
    batch = {"tokens": tokens, "targets": tokens, "positions": places, "index": places}
    needs, losses = [], []
    for c.memory.tile in (0, 64):
        evaluate = make_evaluate(graphdef, step_settings(c))
        parts = (
            nnx.as_pure(trainable),
            nnx.as_pure(frozen),
            {name: x[None] for name, x in batch.items()},
        )
        needs.append(
            evaluate.lower(*parts, FULL, None).compile().memory_analysis().temp_size_in_bytes
        )
        losses.append(evaluate(*jax.tree.map(jax.numpy.asarray, parts), FULL, None)[0])
    assert needs[1] < needs[0] / 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
