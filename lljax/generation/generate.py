"""Generates text: prefills a key/value cache with prompts, then decodes token by token."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lljax.generation.detokenize import Detokenizer
from lljax.generation.sample import GREEDY, Sampling, sample_token
from lljax.models.cache import Cache, empty_cache, grow, repeat_rows
from lljax.models.decoder import Decoder
from lljax.models.rope import KINDS
from lljax.parallel.rounding import round_up
from lljax.parallel.sharding import Layout, row_parts

CHUNK = 512  # prompt tokens in a forward pass: bounds the memory of a long prompt


@dataclasses.dataclass(frozen=True)
class Completion:
    """tokens: the new ones, without the stop token. text: their text, without the stop string; None
    without a tokenizer. ended: by a stop token or stop string, not by the limit.
    """

    tokens: list[int]
    text: str | None
    ended: bool


def generate(
    model: Decoder,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    stop: frozenset[int] = frozenset(),
    stop_strings: tuple[str, ...] = (),
    tokenizer: Any = None,
    rows: int = 8,
    dtype: Any = jnp.float32,
    cache_dtype: Any = None,
    layout: Layout | None = None,
) -> list[Completion]:
    """Continues each of `prompts` (int [n]) by up to `tokens` tokens.

    Attention is full, however the model was trained. A completion does not depend on the other
    prompts.

    stop: tokens that end a completion. stop_strings: strings that end it and are cut off; they
      require the `tokenizer`.
    rows: prompts in a batch; 1 if RoPE depends on the length. Adjacent prompts that share a prefix
      of at least half their length are batched, and the prefix is prefilled once.
    dtype: of the computation. cache_dtype: of keys and values; jnp.int8 quantizes them; None for
      `dtype`.
    layout: the mesh of the model, with `sequence` 1; None for one device.
    """
    if KINDS[model.spec.rope.type].by_length:
        rows = 1
    completions: list[Completion] = []
    for first, after in _batches(prompts, rows):
        batch = prompts[first:after]
        growing = [_Growing(tokenizer, stop, stop_strings) for _ in batch]
        for step in stream(
            model,
            batch,
            tokens=tokens,
            sampling=sampling,
            dtype=dtype,
            cache_dtype=cache_dtype,
            layout=layout,
            first=first,
        ):
            for row, token in zip(growing, step, strict=True):
                row.add(int(token))
            if all(row.ended for row in growing):
                break
        completions.extend(row.completion() for row in growing)
    return completions


def stream(
    model: Decoder,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    dtype: Any = jnp.float32,
    cache_dtype: Any = None,
    layout: Layout | None = None,
    first: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields, up to `tokens` times, the next token of each of `prompts`, int32. See `generate`.

    first: the number of the first prompt, for the random numbers.
    """
    graphdef, state = nnx.split(model)
    # RoPE that depends on the length gets the final length, so that cached keys stay valid.
    total = max(map(len, prompts)) + tokens
    read = functools.partial(
        read_chunk, graphdef, state, rope_length=total, dtype=dtype, layout=layout
    )
    reader = _Reader(model, read, cache_dtype or dtype, layout)
    logits, cache, lengths = reader.prefill(prompts, tokens)
    B = len(lengths)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(
        first + jnp.arange(B)
    )
    seen = _seen(prompts, B, model.spec.V) if sampling.repetition != 1 else None
    positions = jnp.asarray(lengths, jnp.int32)
    ready = None
    for i in range(tokens):
        token, seen = _sample(logits, keys, i, seen, sampling)
        if i + 1 < tokens:  # runs while the host handles the previous token
            logits, cache = read(token[:, None], positions[:, None] + i, None, cache)
        if ready is not None:
            yield np.asarray(ready)[: len(prompts)]
        ready = token
    if ready is not None:
        yield np.asarray(ready)[: len(prompts)]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads prompts into a new cache. read: `read_chunk` of the model."""

    model: Decoder
    read: Any
    cache_dtype: Any
    layout: Layout | None

    def prefill(
        self, prompts: Sequence[np.ndarray], tokens: int
    ) -> tuple[Float[Array, "B V"], Cache, list[int]]:
        """The logits after each prompt, the cache with room for `tokens` more, and the lengths of
        the rows. B is len(prompts), padded to a number that the mesh divides.
        """
        shared = _shared(prompts)
        rest = [np.asarray(prompt[shared:], np.int32) for prompt in prompts]
        unit = row_parts(self.layout.mesh) if self.layout else 1
        B = round_up(len(prompts), unit)
        rest += [rest[0]] * (B - len(rest))
        width = round_up(max(map(len, rest)), CHUNK)
        slots = round_up(shared + width + tokens, CHUNK)
        if shared:
            cache = self._read_prefix(prompts[0][:shared], unit)
            cache = grow(repeat_rows(cache, B // unit), slots)
        else:
            cache = empty_cache(self.model.spec, B, slots, self.cache_dtype)
        padded, positions, segments = (np.zeros((B, width), np.int32) for _ in range(3))
        for row, ids in enumerate(rest):  # padded on the left: all rows end in the same slot
            start = width - len(ids)
            padded[row, start:], segments[row, start:] = ids, 1
            positions[row, start:] = shared + np.arange(len(ids))
        logits = None
        for start in range(0, width, CHUNK):
            part = slice(start, start + CHUNK)
            logits, cache = self.read(padded[:, part], positions[:, part], segments[:, part], cache)
        assert logits is not None, "no prompt is empty"
        return logits, cache, [shared + len(ids) for ids in rest]

    def _read_prefix(self, prefix: np.ndarray, rows: int) -> Cache:
        """The cache of a prefix of whole chunks, in `rows` equal rows."""
        cache = empty_cache(self.model.spec, rows, len(prefix), self.cache_dtype)
        for start in range(0, len(prefix), CHUNK):
            chunk = np.broadcast_to(prefix[start : start + CHUNK], (rows, CHUNK)).astype(np.int32)
            positions = np.broadcast_to(start + np.arange(CHUNK, dtype=np.int32), chunk.shape)
            _, cache = self.read(chunk, positions, None, cache)
        return cache


def _seen(prompts: Sequence[np.ndarray], B: int, V: int) -> Bool[Array, "B V"]:
    """The tokens of each prompt; rows beyond the prompts repeat the first."""
    seen = np.zeros((B, V), bool)
    for row, prompt in enumerate([*prompts, *[prompts[0]] * (B - len(prompts))]):
        seen[row, prompt] = True
    return jnp.asarray(seen)


def _batches(prompts: Sequence[np.ndarray], rows: int) -> Iterator[tuple[int, int]]:
    """(first, after) of batches of up to `rows` prompts: adjacent prompts that share a prefix of at
    least half their length, or others.
    """
    pairs = zip(prompts, prompts[1:], strict=False)
    alike = [
        False,
        *(2 * _shared(pair) > min(map(len, pair)) for pair in pairs),
        False,
        False,
    ]
    first = 0
    for after in range(1, len(prompts) + 1):
        share_prefix = alike[first + 1]
        goes_on = alike[after] if share_prefix else not alike[after + 1]
        if after == len(prompts) or after - first == rows or not goes_on:
            yield first, after
            first = after


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """The length of the common prefix in whole chunks; each prompt keeps at least one token."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts)) - 1
    equal = np.all(
        [np.asarray(prompt[:shortest]) == np.asarray(prompts[0][:shortest]) for prompt in prompts],
        axis=0,
    )
    return int(np.argmin([*equal, False])) // CHUNK * CHUNK


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "layout"), donate_argnums=5)
def read_chunk(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B C"],
    positions: Int[Array, "B C"],
    segments: Int[Array, "B C"] | None,
    cache: Cache,
    *,
    rope_length: int,
    dtype: Any,
    layout: Layout | None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads tokens into the cache, which is donated; returns the logits after the last token."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model(
        tokens,
        positions=positions,
        segments=segments,
        cache=cache,
        dtype=dtype,
        rope_length=rope_length,
        layout=layout,
    )
    return model.logits(hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnums=4)
def _sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    i: int,
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """The i-th new token of every row, and `seen` with it."""
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
    token = sample_token(logits, step_keys, seen, sampling)
    return token, None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)


class _Growing:
    """A completion while it grows."""

    def __init__(self, tokenizer: Any, stop: frozenset[int], stop_strings: tuple[str, ...]):
        self.tokens: list[int] = []
        self.ended = False
        self._stop = stop
        self._pieces: list[str] = []
        self._text = None
        if tokenizer is not None:
            self._text = Detokenizer(tokenizer, stop_strings, skip_special_tokens=True)

    def add(self, token: int) -> None:
        if self.ended:
            return
        if token in self._stop:
            self.ended = True
            return
        self.tokens.append(token)
        if self._text is not None:
            self._pieces.append(self._text.add(token))
            self.ended = self._text.ended

    def completion(self) -> Completion:
        if self._text is None:
            return Completion(self.tokens, None, self.ended)
        text = "".join(self._pieces) + self._text.finish()
        return Completion(self.tokens, text, self.ended or self._text.ended)
