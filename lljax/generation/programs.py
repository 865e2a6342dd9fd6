"""The compiled programs of the engine: reading a prompt, decoding, and moving rows.

Their shapes are few: rows and cache slots are powers of two, and a prompt is read in pieces of a
few sizes, so that a request of a new length compiles nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lljax.generation.sample import Samplers, sample_tokens
from lljax.models import cache as caches
from lljax.models.by_row import of_rows
from lljax.models.cache import Cache
from lljax.models.decoder import Decoder
from lljax.models.mixers.mixer import State
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout

Weights = tuple[jax.Array, ...]  # jax reads a tuple faster than a state, at every call
MOST_LIKELY = 20  # tokens whose log-probabilities are returned beside the drawn one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Requests on the device, one a row; every array is [B, ...]. The token drawn last is not read
    yet.

    scored: whether log-probabilities are wanted. rope_length:
    tokens that the request may reach, for a RoPE kind that depends on it.
    """

    cache: Cache
    samplers: Samplers
    scored: Bool[Array, " B"]
    rope_length: Int[Array, " B"]

    def next(
        self,
        program: "Program",
        weights: Weights,
        models: Int[np.ndarray, " B"] | None,
        allowed: Bool[np.ndarray, "B V"] | None,
        trunk: Cache | None = None,
    ) -> tuple["Rows", "Drawn"]:
        """Reads the last token of every row and draws the next; see `read_drawn` and `draw`."""
        logits, cache = read_drawn(
            program, weights, self.cache, self.samplers.token, self.rope_length, models, trunk
        )
        drawn, samplers = draw(logits, self.samplers, self.scored, allowed)
        return dataclasses.replace(self, cache=cache, samplers=samplers), drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """The next token of each row; its log-probability, and the `MOST_LIKELY` most likely tokens
    with theirs, before temperature and filters. Zeros in a batch where nobody wants them.
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    top_tokens: Int[Array, "B top"]
    top_logprobs: Float[Array, "B top"]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static in every program. graphdef, treedef: of the model and its state. specs: of the
    model, or of the models of a mixed one (lljax.models.by_row). dtype: of the computation. layout:
    of the mesh; None for one device.
    """

    graphdef: nnx.GraphDef
    treedef: Any
    specs: tuple[DecoderSpec, ...]
    dtype: Any
    layout: Layout | None

    @property
    def spec(self) -> DecoderSpec:
        return self.specs[0]

    # Once: hashing takes milliseconds, and every call of a compiled program asks for it.
    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graphdef, self.specs, self.dtype, self.layout))

    def __hash__(self) -> int:
        return self._hash


def program_of(
    model: Decoder, dtype: Any, layout: Layout | None, specs: tuple[DecoderSpec, ...] = ()
) -> tuple[Program, Weights]:
    """The program of a model and its weights. specs: see `Program`; of the model by default."""
    graphdef, state = nnx.split(model)
    weights, treedef = jax.tree.flatten(state)
    return Program(graphdef, treedef, specs or (model.spec,), dtype, layout), tuple(weights)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_prompt(
    program: Program,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    rope_length: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the first `count` of `tokens` into the cache, which is donated; returns the logits
    after the last of them, float32.
    """
    model, hidden, cache = _read(program, weights, cache, tokens, count, rope_length)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_drawn(
    program: Program,
    weights: Weights,
    cache: Cache,
    token: Int[Array, " B"],
    rope_length: Int[Array, " B"],
    models: Int[Array, " B"] | None = None,
    trunk: Cache | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one token of every row into the cache, which is donated; returns the logits after it,
    float32. models: of the rows, for a mixed model. trunk: of a forked cache, see `fork`.
    """
    model, hidden, cache = _read(
        program, weights, cache, token[:, None], None, rope_length, models, trunk
    )
    return model.logits(hidden[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score_prompt(
    program: Program,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    rope_length: Int[Array, " B"],
    following: Int[Array, " T"],
) -> tuple[Float[Array, "B V"], Cache, Drawn]:
    """`read_prompt`, and the scores of the token that follows each of the first row's, [T]."""
    model, hidden, cache = _read(program, weights, cache, tokens, count, rope_length)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), cache, _scores(model.logits(hidden[0]), following)


@functools.partial(jax.jit, donate_argnums=1)
def draw(
    logits: Float[Array, "B V"],
    samplers: Samplers,
    scored: Bool[Array, " B"],
    allowed: Bool[Array, "B V"] | None,
) -> tuple[Drawn, Samplers]:
    """The next token of every row, and the samplers, which are donated, after it.

    allowed: the tokens that may be drawn; None for all.
    """
    permitted = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
    token, samplers = sample_tokens(permitted, samplers)
    most = min(MOST_LIKELY, logits.shape[-1])

    def nothing():
        B = len(token)
        return Drawn(token, jnp.zeros(B), jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most)))

    return jax.lax.cond(jnp.any(scored), lambda: _scores(logits, token), nothing), samplers


def _read(
    program: Program,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"] | None,
    rope_length: Int[Array, " B"],
    models: Int[Array, " B"] | None = None,
    trunk: Cache | None = None,
) -> tuple[Any, Float[Array, "B T D"], Cache]:
    """The model, the hidden states of `tokens` that follow those in the cache, and the cache."""
    state = jax.tree.unflatten(program.treedef, weights)
    if models is not None:
        state = of_rows(state, models)
    model = nnx.merge(program.graphdef, state)
    hidden, cache = model.continued(
        cache,
        tokens,
        count=count,
        dtype=program.dtype,
        rope_length=rope_length,
        layout=program.layout,
        specs=program.specs,
        models=models,
        trunk=trunk,
    )
    return model, hidden, cache


def _scores(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Drawn:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MOST_LIKELY, logits.shape[-1]))
    return Drawn(token, chosen, top_tokens, top_logprobs)


# ---------------------------------------------------------------- rows
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(
    spec: DecoderSpec, B: int, slots: int, dtype: Any, layout: Layout | None = None
) -> Cache:
    """layout: of the mesh over which it is cut (`cache_sharding`); None to leave that open."""
    return _cut(caches.empty_cache(spec, B, slots, dtype), layout)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def fork(trunk: Cache, B: int, S: int, layout: Layout | None = None) -> Cache:
    """See lljax.models.cache.fork. layout: see `empty_cache`."""
    return _cut(caches.fork(trunk, B, S), layout)


def _cut(cache: Cache, layout: Layout | None) -> Cache:
    if layout is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, caches.cache_sharding(cache, layout))


@functools.partial(jax.jit, static_argnums=1)
def grow(rows: Rows, slots: int) -> Rows:
    return dataclasses.replace(rows, cache=caches.grow(rows.cache, slots))


@jax.jit
def take(rows: Rows, numbers: Int[Array, " B"]) -> Rows:
    """The rows of these numbers."""
    return caches.take_rows(rows, numbers)


@functools.partial(jax.jit, donate_argnums=0)
def put(rows: Rows, row: Rows, number: Int[Array, ""]) -> Rows:
    """`rows`, which is donated, with the first of `row` in the place of this number."""

    def one(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new[:1], number, axis=0)

    return jax.tree.map(one, rows, row)


# ---------------------------------------------------------------- prefixes
@functools.partial(jax.jit, static_argnums=2)
def part(cache: Cache, start: Int[Array, ""], T: int) -> tuple[State, ...]:
    """What the T tokens from slot `start` on left in the first row."""
    states = (state.part(start, T) for state in cache.states)
    return tuple(jax.tree.map(lambda x: x[:1], state) for state in states)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def restore(cache: Cache, states: tuple[State, ...], T: int) -> Cache:
    """The cache, which is donated, as if every row had read the T tokens of `states` next."""
    B = len(cache.used)
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), states)
    states = tuple(
        state.write(more, cache.used) for state, more in zip(cache.states, wide, strict=True)
    )
    return dataclasses.replace(cache, states=states, used=cache.used + T)
