"""Small models and prompts that tests of generation share."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.generation.completion import Growing, Request
from lljax.models import lora
from lljax.models.by_layer import split_layers
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize

HF = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
CHUNK = 16
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n) for n in (37, 5, 21, 16)]
# layers that slide, layers that are cut into chunks and have no RoPE on every fourth
LOCAL = {
    "model_type": "llama4_text",
    "attention_chunk_size": 8,
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}


@functools.cache
def _build(changes: str, seed: int) -> Decoder:
    made = Decoder(spec_from_hf(HF | json.loads(changes)))
    initialize(made, seed, deviation=0.3)
    return made


def build(seed: int = 0, **changes) -> Decoder:
    """A random model, one object for equal arguments."""
    return _build(json.dumps(changes, sort_keys=True), seed)


def by_layer(model: Decoder) -> Decoder:
    """A copy of `model` whose layers are not stacked."""
    graphdef, state = nnx.split(model)
    return split_layers(nnx.merge(graphdef, jax.tree.map(jnp.copy, state)))


def adapted(base: Decoder, seed: int, also_train=(), rope=None, **settings) -> Decoder:
    """`base` with an adapter of random factors; weights of the roles `also_train` and the RoPE are
    changed, too. All others are the arrays of `base`.
    """
    model, key = nnx.clone(base), jax.random.key(seed)
    lora.attach(model, also_train=also_train, **settings)
    initialize(model, seed)
    for number, (_, variable) in enumerate(declared(model)):
        role = variable.get_metadata("role")
        if role in ("lora_b", *also_train):
            value = variable.get_value()
            noise = jax.random.normal(jax.random.fold_in(key, number), value.shape)
            variable.set_value(value + 0.2 * noise)
    if rope:
        model.spec = dataclasses.replace(model.spec, rope=rope, max_length=256)
    return model


@functools.partial(nnx.jit, static_argnames="rope_length")
def read_whole(model: Decoder, row: jnp.ndarray, rope_length: int | None) -> jnp.ndarray:
    positions = jnp.arange(row.shape[1])[None]
    return model.logits(model(row, positions=positions, rope_length=rope_length))


def logits_after(model: Decoder, prompt, tokens, *, rope_length: int | None = None):
    """The logits [len(tokens), V] before each of `tokens` that continue `prompt`, of one pass over
    the whole row.
    """
    row = [*prompt, *tokens]
    padded = jnp.asarray([row + [0] * (96 - len(row))])
    return read_whole(model, padded, rope_length)[0, len(prompt) - 1 : len(row) - 1]


def scripted(reply: Callable[[Request], Iterable[int]]) -> type:
    """A class in the place of Engine, whose requests are continued by the tokens of `reply`."""

    class Scripted:
        def __init__(self, model, tokenizer=None, **settings):
            self.tokenizer, self.waiting = tokenizer, []

        def submit(self, request, heard=None):
            self.waiting.append(Growing(request, self.tokenizer, heard))
            return self.waiting[-1]

        def step(self):
            growing = self.waiting.pop(0)
            for token in reply(growing.request):
                if growing.reason is None:
                    growing.add(token, None)
            if growing.reason is None:
                growing.end("length")

        def run(self, requests):
            rows = [self.submit(request) for request in requests]
            for _ in rows:
                self.step()
            return [row.completion() for row in rows]

    return Scripted
