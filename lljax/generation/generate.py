"""Text from a model: prompts are read a chunk at a time into a key/value cache, and continued a
token at a time.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.generation.detokenize import Detokenizer
from lljax.generation.sample import GREEDY, Sampling, choose
from lljax.models.cache import empty_cache, longer, repeated
from lljax.parallel.sharding import Layout, row_parts

CHUNK = 512  # prompt tokens read at a time: bounds the memory of a long prompt
BY_LENGTH = ("dynamic", "longrope")  # RoPE kinds whose angles depend on the length in use


@dataclasses.dataclass(frozen=True)
class Completion:
    """tokens: those written, without the one that ended it. text: of them, without the stop string;
    None where no tokenizer was given. ended: by a stop token or string, and not for want of
    room.
    """

    tokens: list[int]
    text: str | None
    ended: bool


def generate(
    model: nnx.Module,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    stop: frozenset[int] = frozenset(),
    stop_strings: tuple[str, ...] = (),
    tokenizer=None,
    rows: int = 8,
    dtype=jnp.float32,
    cache_dtype=None,
    layout: Layout | None = None,
) -> list[Completion]:
    """Continues each of `prompts` (int [n]) by up to `tokens` tokens.

    Attention is full whatever the model was trained under, and a completion does not depend on the
    prompts beside it.

    stop: tokens that end a completion. stop_strings: strings that do, and are cut off; they need
      the `tokenizer`.
    rows: prompts continued side by side; with a RoPE that depends on the length it is one.
      Neighbours that are alike for half of their length, as questions about one document are, stand
      together, and what they begin with is read once.
    dtype: of the compute. cache_dtype: of keys and values; jnp.int8 keeps them in eight bits; None
      for `dtype`.
    layout: the mesh that the model lies on, of which `sequence` is 1; None for one device.
    """
    if model.spec.rope.type in BY_LENGTH:
        rows = 1
    done = []
    for first, after in _batches(prompts, rows):
        batch = prompts[first:after]
        written = [_Written(tokenizer, stop, stop_strings) for _ in batch]
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
            for row, token in zip(written, step):
                row.add(int(token))
            if all(row.ended for row in written):
                break
        done.extend(row.completion() for row in written)
    return done


def stream(
    model: nnx.Module,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    dtype=jnp.float32,
    cache_dtype=None,
    layout: Layout | None = None,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Yields, up to `tokens` times, the next token of each of `prompts`: int32 [len(prompts)]. See
    `generate`.

    first: what the first prompt counts as for the random numbers.
    """
    graphdef, state = nnx.split(model)
    shared = _shared(prompts)
    rest = [np.asarray(prompt[shared:], np.int32) for prompt in prompts]
    B = (
        -(-len(prompts) // row_parts(layout.mesh)) * row_parts(layout.mesh)
        if layout
        else len(prompts)
    )
    rest += [rest[0]] * (B - len(rest))  # rows that make up the number that the mesh divides
    width = _up(max(map(len, rest)), CHUNK)
    slots = _up(shared + width + tokens, CHUNK)
    # what a RoPE that looks at the length is given, so that cached keys stay true
    total = max(map(len, prompts)) + tokens
    read = functools.partial(
        read_chunk, graphdef, state, rope_length=total, dtype=dtype, layout=layout
    )

    cache = empty_cache(
        model.spec, B if not shared else _one_row(layout), shared or slots, cache_dtype or dtype
    )
    for start in range(0, shared, CHUNK):
        piece = np.broadcast_to(
            prompts[0][start : start + CHUNK], (_one_row(layout), CHUNK)
        ).astype(np.int32)
        _, cache = read(
            piece,
            np.broadcast_to(start + np.arange(CHUNK, dtype=np.int32), piece.shape),
            None,
            cache,
        )
    if shared:
        cache = longer(repeated(cache, B // _one_row(layout)), slots)
    padded, positions, segments = (np.zeros((B, width), np.int32) for _ in range(3))
    for row, own in enumerate(rest):  # padding on the left, so that all rows end in the same slot
        padded[row, width - len(own) :], segments[row, width - len(own) :] = own, 1
        positions[row, width - len(own) :] = shared + np.arange(len(own))
    for start in range(0, width, CHUNK):
        piece = slice(start, start + CHUNK)
        logits, cache = read(padded[:, piece], positions[:, piece], segments[:, piece], cache)

    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(
        first + jnp.arange(B)
    )
    seen = None
    if sampling.repetition != 1:
        seen = np.zeros((B, model.spec.V), bool)
        for row, prompt in enumerate([*prompts, *[prompts[0]] * (B - len(prompts))]):
            seen[row, prompt] = True
        seen = jnp.asarray(seen)
    at = jnp.asarray([shared + len(own) for own in rest], jnp.int32)
    ready = None
    for i in range(tokens):
        token, seen = _choose(logits, keys, i, seen, sampling)
        if i + 1 < tokens:  # under way while the host looks at the token
            logits, cache = read(token[:, None], at[:, None] + i, None, cache)
        if ready is not None:
            yield np.asarray(ready)[: len(prompts)]
        ready = token
    if ready is not None:
        yield np.asarray(ready)[: len(prompts)]


def _batches(prompts, rows: int) -> Iterator[tuple[int, int]]:
    """(first, after) of up to `rows` prompts each: of those that are like the one before them, or
    of others.
    """
    alike = [
        False,
        *(2 * _shared(pair) > min(map(len, pair)) for pair in zip(prompts, prompts[1:])),
        False,
        False,
    ]
    first = 0
    for at in range(1, len(prompts) + 1):
        of_one_document = alike[first + 1]
        goes_on = alike[at] if of_one_document else not alike[at + 1]
        if at == len(prompts) or at - first == rows or not goes_on:
            yield first, at
            first = at


def _shared(prompts) -> int:
    """How many tokens all prompts begin with, in whole chunks, and so that each has one of its
    own.
    """
    if len(prompts) == 1:
        return 0
    least = min(map(len, prompts)) - 1
    alike = np.all(
        [np.asarray(prompt[:least]) == np.asarray(prompts[0][:least]) for prompt in prompts], axis=0
    )
    return int(np.argmin([*alike, False])) // CHUNK * CHUNK


def _one_row(layout: Layout | None) -> int:
    """As few rows as the mesh divides."""
    return row_parts(layout.mesh) if layout else 1


def _up(n: int, of: int) -> int:
    return -(-n // of) * of


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "layout"), donate_argnums=5)
def read_chunk(graphdef, state, tokens, positions, segments, cache, *, rope_length, dtype, layout):
    """Reads tokens [B, C] into the cache; returns the logits [B, V] after the last one."""
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
def _choose(logits, keys, i, seen, sampling: Sampling):
    token = choose(logits, jax.vmap(lambda key: jax.random.fold_in(key, i))(keys), seen, sampling)
    return token, None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)


class _Written:
    """One completion while it grows."""

    def __init__(self, tokenizer, stop, stop_strings):
        self.tokens, self.ended = [], False
        self._stop, self._pieces = stop, []
        self._text = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, stop_strings, skip_special_tokens=True)
        )

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
