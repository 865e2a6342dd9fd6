"""Several answers to one prompt, whose keys and values exist once (Juravsky et al. 2024, Hydragen,
arXiv 2402.05099): the row of an answer holds its own tokens only, and a step of all answers reads
the prompt's cache once. The engine copies the prompt's cache into every row instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lljax.generation import programs
from lljax.generation.completion import Completion, Growing, Request
from lljax.generation.programs import Program, Rows, Weights, program_of
from lljax.generation.reading import CHUNK, cache_slots, piece_sizes, rope_length
from lljax.generation.sample import Samplers, samplers_of
from lljax.models import cache as caches
from lljax.models.cache import Cache
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec
from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import Layout, row_parts

LEAST_SLOTS = 16  # of an answer


def write_answers(
    model: Decoder,
    requests: Sequence[Request],
    *,
    dtype: Any,
    cache_dtype: Any = None,
    chunk: int = CHUNK,
    layout: Layout | None = None,
    look: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """The completions of `requests`, which share prompt and number of tokens, and differ in
    sampling, numbers and stop tokens. They are the engine's, but for rounding.

    dtype, cache_dtype, layout: see `Engine`. chunk: prompt tokens in a forward pass.
    look: called between two steps of the device; what it raises ends the writing.
    """
    _check(requests)
    program, weights = program_of(model, jnp.dtype(dtype), layout)
    sizes = _Sizes.of(len(requests), requests[0], chunk, layout)
    growing = [Growing(request, None, None) for request in requests]
    trunk = programs.empty_cache(
        model.spec, sizes.unit, sizes.trunk, jnp.dtype(cache_dtype or dtype), layout
    )
    logits, trunk = _read(program, weights, trunk, requests[0], sizes, look)
    # The rows get all slots at once: a cache that grows is in memory twice while it does, and every
    # size of it is one more program. Beside a long prompt the slots in vain cost little time.
    cache = programs.fork(trunk, sizes.rows, sizes.own, layout)
    scored = jnp.zeros(sizes.rows, bool)
    drawn, samplers = programs.draw(
        jnp.broadcast_to(logits[:1], (sizes.rows, logits.shape[1])),
        _samplers(requests, model.spec, sizes.rows),
        scored,
        None,
    )
    length = jnp.full(sizes.rows, rope_length(model.spec, requests[0]), jnp.int32)
    rows = Rows(cache, samplers, scored, length)
    # The device is a step ahead: its next step begins before the tokens of the last are looked at.
    before = drawn.token, list(range(len(requests)))
    for _ in range(1, requests[0].tokens):
        look()
        writing = [i for i, one in enumerate(growing) if one.reason is None]
        if not writing:
            break
        places = before[1]
        if _width(len(writing), sizes.unit) < len(rows.scored):
            rows, places = _compact(rows, places, writing, sizes.unit)
        rows, drawn = rows.next(program, weights, None, None, trunk)
        _add(growing, *before)
        before = drawn.token, places
    _add(growing, *before)
    return [one.completion() for one in growing]


def lower_programs(
    model: Decoder,
    *,
    prompt: int,
    answers: int,
    tokens: int,
    dtype: Any,
    cache_dtype: Any = None,
    chunk: int = CHUNK,
    layout: Layout | None = None,
) -> dict[str, jax.stages.Lowered]:
    """The two programs in which `write_answers` spends its time, for the analysis of their memory:
    "read", a chunk of a prompt of `prompt` tokens; "write", a token of each of `answers` answers of
    up to `tokens` tokens.

    model: may be abstract, with the dtype of its values and, over a mesh, their shardings. Other
    arguments: see `write_answers`.
    """
    program, weights = program_of(model, jnp.dtype(dtype), layout)
    sizes = _Sizes.of(answers, Request(range(prompt), tokens), chunk, layout)

    def abstract(build: Callable[..., Cache], *operands: Cache) -> Cache:
        cache = jax.eval_shape(build, *operands)
        if layout is None:
            return cache
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            cache,
            caches.cache_sharding(cache, layout),
        )

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    kept = jnp.dtype(cache_dtype or dtype)
    trunk = abstract(lambda: caches.empty_cache(model.spec, sizes.unit, sizes.trunk, kept))
    own = abstract(lambda trunk: caches.fork(trunk, sizes.rows, sizes.own), trunk)
    unit, rows = integers(sizes.unit), integers(sizes.rows)
    return {
        "read": programs.read_prompt.lower(
            program, weights, trunk, integers(sizes.unit, chunk), unit, unit
        ),
        "write": programs.read_drawn.lower(program, weights, own, rows, rows, None, trunk),
    }


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Shapes of the programs, which are few. chunk: prompt tokens in a forward pass. unit: rows of
    the prompt, one for each device that shares rows; the number of rows is a multiple of it. trunk:
    slots of the prompt. rows, own: rows of the answers, and slots of each.
    """

    chunk: int
    unit: int
    trunk: int
    rows: int
    own: int

    @classmethod
    def of(cls, answers: int, request: Request, chunk: int, layout: Layout | None) -> "_Sizes":
        unit = row_parts(layout.mesh) if layout else 1
        return cls(
            chunk=chunk,
            unit=unit,
            trunk=cache_slots(len(request.prompt), chunk),
            rows=_width(answers, unit),
            own=cache_slots(max(1, request.tokens - 1), LEAST_SLOTS),  # the last is not read
        )


def _width(answers: int, unit: int) -> int:
    """Rows of a program that writes so many answers."""
    return unit << (cdiv(answers, unit) - 1).bit_length()


def _check(requests: Sequence[Request]) -> None:
    first = requests[0]
    prompt = list(first.prompt)
    assert prompt and first.tokens > 0, "there is a prompt, and something to write"
    for one in requests:
        assert one is first or list(one.prompt) == prompt, "the answers share a prompt"
        assert one.tokens == first.tokens, "the answers have the same number of tokens"
        assert not (one.logprobs or one.prompt_logprobs), "log-probabilities: use the engine"
        assert not (one.constraint or one.adapter), "constraints and adapters: use the engine"
        assert not one.stop_strings, "stop strings: use the engine"


def _read(
    program: Program,
    weights: Weights,
    trunk: Cache,
    request: Request,
    sizes: _Sizes,
    look: Callable[[], None],
) -> tuple[Float[Array, "unit V"], Cache]:
    """The logits after the prompt, and `trunk`, which is donated, after it."""

    def filled(value: int) -> np.ndarray:
        return np.full(sizes.unit, value, np.int32)

    prompt, before = np.asarray(request.prompt, np.int32), None
    for start in range(0, len(prompt), sizes.chunk):
        look()
        piece = prompt[start : start + sizes.chunk]
        width = min(size for size in piece_sizes(sizes.chunk) if size >= len(piece))
        tokens = np.zeros((sizes.unit, width), np.int32)
        tokens[:, : len(piece)] = piece
        length = filled(rope_length(program.spec, request))
        logits, trunk = programs.read_prompt(
            program, weights, trunk, tokens, filled(len(piece)), length
        )
        if before is not None:  # else all chunks are queued, and `look` is called too early
            before.block_until_ready()
        before = logits
    return logits, trunk


def _samplers(requests: Sequence[Request], spec: DecoderSpec, rows: int) -> Samplers:
    """A row for each request, and the first again in the rows behind them."""
    padded = [*requests, *[requests[0]] * (rows - len(requests))]
    each = [samplers_of(one.sampling, one.numbers, one.prompt, spec.V, 1) for one in padded]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *each)


def _compact(
    rows: Rows, places: Sequence[int], writing: Sequence[int], unit: int
) -> tuple[Rows, list[int]]:
    """The rows of the answers that go on, padded by the first; and which answers they are.

    places: the answers of `rows`.
    """
    kept = [places.index(i) for i in writing]
    numbers = np.full(_width(len(writing), unit), kept[0], np.int32)
    numbers[: len(kept)] = kept
    return programs.take(rows, numbers), list(writing)


def _add(growing: Sequence[Growing], tokens: jax.Array, places: Sequence[int]) -> None:
    """Gives each answer the token of its row."""
    for token, i in zip(np.asarray(tokens).tolist(), places, strict=False):  # rows may be padded
        if growing[i].reason is None:  # else the device drew one more than was wanted
            growing[i].add(token, None)
