"""Continues many requests at once (continuous batching, Yu et al. 2022, Orca): requests join and
leave between two tokens, and prompts are read in chunks between the tokens of the others.

A turn of the engine (`Engine.step`) reads one chunk of one prompt and draws one token for every
request that has been read. The device is a turn ahead: a turn begins its programs before it looks
at the tokens of the turn before.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lljax.errors import ConfigError
from lljax.generation import programs
from lljax.generation.completion import Completion, Growing, Logprobs, Piece, Request
from lljax.generation.lanes import Active, Lanes
from lljax.generation.prefixes import Prefixes
from lljax.generation.programs import Drawn, Rows
from lljax.generation.reading import CHUNK, Reading, cache_slots, piece_sizes, rope_length
from lljax.generation.sample import Samplers, samplers_of
from lljax.generation.variants import Variants
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout, row_parts

OLDEST_EVERY = 4  # of so many turns at least one reads the oldest prompt


@dataclasses.dataclass(frozen=True)
class Counts:
    """waiting, reading, writing: requests now. read, reused: tokens of prompts so far that were
    read, and that were known from prompts before. written: tokens so far. kept: bytes of the
    beginnings of prompts on the device.
    """

    waiting: int
    reading: int
    writing: int
    read: int
    reused: int
    written: int
    kept: int


class Engine:
    """`submit`, `cancel` and `counts` may be called from any thread, `step` and `run` from one."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any = None,
        *,
        rows: int = 8,
        longest: int | None = None,
        dtype: Any = jnp.float32,
        cache_dtype: Any = None,
        prefix_bytes: int = 0,
        chunk: int = CHUNK,
        layout: Layout | None = None,
    ):
        """model: reads with full attention, however it was trained. tokenizer: for texts and stop
        strings; None for tokens alone.
        rows: requests that are read and written at the same time.
        longest: tokens of a prompt and its completion; None for no limit.
        dtype: of the computation. cache_dtype: of keys and values; jnp.int8 quantizes them; None
          for `dtype`.
        prefix_bytes: device memory for the beginnings of prompts, kept across requests.
        layout: the mesh of the model, with `sequence` 1; None for one device.
        """
        self.spec, self.tokenizer, self.longest = model.spec, tokenizer, longest
        self._dtype, self._layout = jnp.dtype(dtype), layout
        self._variants = Variants(self._dtype, layout)
        self._variants.add(None, model)
        self._cache_dtype = jnp.dtype(cache_dtype or dtype)
        self._unit = row_parts(layout.mesh) if layout else 1
        self._rows, self._chunk = rows, chunk
        self._inbox: collections.deque[tuple[str, Growing]] = collections.deque()
        self._wake = threading.Event()
        self._waiting: collections.deque[Growing] = collections.deque()
        self._reading: list[Reading] = []
        self._lanes = Lanes(self._variants, self._unit)
        self._drawn: collections.deque[tuple[Drawn, list[tuple[Active, int]]]] = collections.deque()
        self._prefixes = Prefixes(prefix_bytes)
        self._passed_over = 0  # turns in which a prompt was read, and not the oldest
        self._chunk_read: jax.Array | None = None  # by the device, once it is ready
        self._read_tokens = self._reused_tokens = self._written_tokens = 0

    # ------------------------------------------------------------ any thread
    def submit(self, request: Request, heard: Callable[[Piece], None] | None = None) -> Growing:
        """Queues a request. heard: called with every piece of the completion, by the thread that
        steps.

        Raises:
          ConfigError: the prompt is empty, it and its completion are longer than `longest`, or the
            adapter does not exist.
        """
        if request.adapter not in self._variants:
            names = ", ".join(self.adapters) or "none"
            raise ConfigError(f"there is no adapter {request.adapter!r}, only {names}")
        asked, written = len(request.prompt), request.tokens
        if not asked:
            raise ConfigError("the prompt is empty")
        if written < 1:
            raise ConfigError(f"{written} tokens are to be written: ask for at least 1")
        if self.longest is not None and asked + written > self.longest:
            raise ConfigError(
                f"the prompt has {asked:,} tokens and {written:,} are to be written, and the model "
                f"reads {self.longest:,}"
            )
        growing = Growing(request, self.tokenizer, heard)
        self._tell("submit", growing)
        return growing

    def cancel(self, growing: Growing) -> None:
        """Ends a completion early, with the reason "cancelled"; nothing if it has ended."""
        self._tell("cancel", growing)

    def counts(self) -> Counts:
        return Counts(
            waiting=len(self._waiting) + len(self._inbox),
            reading=self._in_reading,
            writing=len(self._lanes.active),
            read=self._read_tokens,
            reused=self._reused_tokens,
            written=self._written_tokens,
            kept=self._prefixes.size,
        )

    def wait(self, timeout: float | None = None) -> None:
        """Waits until there is something to do."""
        self._wake.wait(timeout)

    def _tell(self, what: str, growing: Growing) -> None:
        self._inbox.append((what, growing))
        self._wake.set()

    # ------------------------------------------------------------ the thread that steps
    @property
    def adapters(self) -> tuple[str, ...]:
        return self._variants.adapters

    def compile(self, longest: int) -> None:
        """Compiles what requests of up to `longest` tokens, prompt and completion, run with the
        present adapters. Constraints and scores of prompts compile with the first request that has
        them.
        """
        slots, filled, request = self._chunk, self._filled, Request([0], 1)
        while True:
            cache = programs.empty_cache(self.spec, self._unit, slots, self._cache_dtype)
            operands = filled(1, np.int32), filled(0, np.int32)
            for width in piece_sizes(self._chunk):
                tokens = np.zeros((self._unit, width), np.int32)
                for name in (None, *self.adapters):
                    model = self._variants.one(name)
                    logits, cache = programs.read_prompt(*model, cache, tokens, *operands)
            if self._prefixes.room:
                states = programs.part(cache, np.int32(0), self._chunk)
                cache = programs.restore(cache, states, self._chunk)
            scored = filled(False, bool)
            _, samplers = programs.draw(logits, self._samplers(request), scored, None)
            self._lanes.compile(Rows(cache, samplers, scored, operands[1]), self._rows)
            if slots >= cache_slots(longest, self._chunk):
                return
            slots *= 2

    def add_adapter(self, name: str, model: Decoder) -> None:
        """Serves `model`, which has the vocabulary of the model as it is, under `name`. Arrays that
        both have are in memory once. If the two differ only as lljax.models.by_row allows, their
        requests are decoded together, else one model after the other.
        """
        self._variants.add(name, model)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter. Its requests are cancelled."""
        mine = [*self._waiting, *(one for r in self._reading for one in r.growing)]
        mine += [active.growing for active in self._lanes.active]
        for growing in mine:
            if growing.request.adapter == name:
                self._forget(growing)
                growing.end("cancelled")
        self._variants.remove(name)

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        growing = [self.submit(request) for request in requests]
        while any(row.reason is None for row in growing):
            self.step()
        return [row.completion() for row in growing]

    def step(self) -> bool:
        """One turn; returns whether there is more to do."""
        self._wake.clear()
        self._hear()
        while self._waiting and self._in_reading + len(self._lanes.active) < self._rows:
            self._begin(self._waiting.popleft())
        due, chunk_before = len(self._drawn), self._chunk_read
        if self._reading:
            self._read(self._next())
        if any(active.growing.request.constraint for active in self._lanes.active):
            # a constraint must know the last token before the next is drawn
            self._collect(len(self._drawn))
            due = 0
        self._drawn.extend(self._lanes.decode())
        self._collect(due)
        if chunk_before is not None:
            # else the whole of a long prompt is queued, and a short one that comes waits for it
            chunk_before.block_until_ready()
        return bool(
            self._inbox
            or self._waiting
            or self._reading
            or self._drawn
            or any(active.wants_more for active in self._lanes.active)
        )

    def _hear(self) -> None:
        while self._inbox:
            what, growing = self._inbox.popleft()
            if what == "submit" and growing.request.adapter in self._variants:
                self._waiting.append(growing)
            elif growing.reason is None:
                self._forget(growing)
                growing.end("cancelled")

    def _forget(self, growing: Growing) -> None:
        """Frees what a request takes."""
        if growing in self._waiting:
            self._waiting.remove(growing)
        for reading in self._reading:
            if growing in reading.growing:
                reading.growing.remove(growing)
        self._reading = [reading for reading in self._reading if reading.growing]
        self._lanes.free(growing)

    # ------------------------------------------------------------ prompts
    @property
    def _in_reading(self) -> int:
        """Requests whose prompts are read."""
        return sum(len(reading.growing) for reading in self._reading)

    def _begin(self, growing: Growing) -> None:
        """Begins to read the prompt of a request, unless another request with it is being read."""
        request = growing.request
        adapter = request.adapter
        length = rope_length(self._variants.spec(adapter), request)
        for reading in self._reading:
            if reading.serves(request, length):
                reading.growing.append(growing)
                self._reuse([growing], len(request.prompt))
                return
        spec = self._variants.spec(adapter)
        slots = cache_slots(len(request.prompt) + 1, self._chunk)
        cache = programs.empty_cache(spec, self._unit, slots, self._cache_dtype)
        about = adapter, self._variants.version(adapter), length
        keys = Prefixes.keys(request.prompt, self._chunk, about) if self._prefixes.room else []
        self._reading.append(Reading([growing], cache, keys, length))

    def _next(self) -> Reading:
        """The prompt with the fewest tokens left, so that a short one does not wait for a long one;
        the oldest if others have been read for a while, so that it is read in the end.
        """
        oldest, shortest = self._reading[0], min(self._reading, key=lambda reading: reading.left)
        chosen = shortest if self._passed_over + 1 < OLDEST_EVERY else oldest
        self._passed_over = 0 if chosen is oldest else self._passed_over + 1
        return chosen

    def _read(self, reading: Reading) -> None:
        """Reads a chunk, after all chunks whose states are known."""
        self._restore(reading)
        start, prompt, request = reading.start, reading.prompt, reading.request
        count = min(self._chunk, reading.left)
        width = min(size for size in piece_sizes(self._chunk) if size >= count)
        tokens = np.zeros((self._unit, width), np.int32)
        tokens[:, :count] = prompt[start : start + count]
        operands = (
            *self._variants.one(request.adapter),
            reading.cache,
            tokens,
            self._filled(count, np.int32),
            self._filled(reading.rope_length, np.int32),
        )
        if request.prompt_logprobs:
            following = np.zeros(width, np.int32)
            known = prompt[start + 1 : start + count + 1]
            following[: len(known)] = known
            logits, reading.cache, scores = programs.score_prompt(*operands, following)
            scores = jax.tree.map(np.asarray, scores)
            reading.growing[0].prompt_logprobs += [_logprobs(scores, i) for i in range(len(known))]
        else:
            logits, reading.cache = programs.read_prompt(*operands)
        self._chunk_read = logits
        reading.start += count
        self._read_tokens += count
        self._keep(reading, start, count)
        if not reading.left:
            self._reading.remove(reading)
            self._begin_writing(reading, logits)

    def _restore(self, reading: Reading) -> None:
        """Takes the chunks whose states are known. The last one is read, for its logits."""
        chunk = self._chunk
        while reading.left > chunk and reading.keys and not reading.request.prompt_logprobs:
            known = self._prefixes.find(reading.keys[reading.start // chunk])
            if known is None:
                break
            reading.cache = programs.restore(reading.cache, known, chunk)
            reading.start += chunk
            self._reuse(reading.growing, chunk)
        self._prefixes.touch(reading.keys[: reading.start // chunk])

    def _reuse(self, growing: Sequence[Growing], tokens: int) -> None:
        """Counts tokens that a prompt need not read; the first of its requests would have."""
        growing[0].reused += tokens
        self._reused_tokens += tokens

    def _keep(self, reading: Reading, start: int, count: int) -> None:
        """Keeps the states of a chunk that has been read, if it is whole."""
        number = start // self._chunk
        keys = reading.keys[: number + 1]
        if count == self._chunk and number < len(reading.keys) and keys[-1] not in self._prefixes:
            states = programs.part(reading.cache, np.int32(start), self._chunk)
            self._prefixes.add(keys, states)

    def _begin_writing(self, reading: Reading, logits: jax.Array) -> None:
        """Draws the first token of every request of a prompt; each continues a cache of its own."""
        length = self._filled(reading.rope_length, np.int32)
        for growing in reading.growing:
            request = growing.request
            scored = self._filled(request.logprobs, bool)
            allowed = None
            if request.constraint is not None:
                allowed = np.tile(request.constraint.allowed(), (self._unit, 1))
            drawn, samplers = programs.draw(logits, self._samplers(request), scored, allowed)
            rows = Rows(reading.cache, samplers, scored, length)
            if growing is not reading.growing[-1]:
                rows = programs.take(rows, np.zeros(self._unit, np.int32))  # a copy
            self._drawn.append((drawn, [(self._lanes.add(growing, rows), 0)]))

    def _filled(self, value: Any, dtype: Any) -> Any:
        return np.full(self._unit, value, dtype)

    def _samplers(self, request: Request) -> Samplers:
        return samplers_of(
            request.sampling, request.numbers, request.prompt, self.spec.V, self._unit
        )

    # ------------------------------------------------------------ tokens
    def _collect(self, batches: int) -> None:
        """Looks at the oldest batches of tokens that the device has drawn."""
        for _ in range(batches):
            drawn, places = self._drawn.popleft()
            drawn = jax.tree.map(np.asarray, drawn)
            for active, row in places:
                if active.growing.reason is None:  # else the device drew one more than was wanted
                    self._add_token(active.growing, drawn, row)

    def _add_token(self, growing: Growing, drawn: Drawn, row: int) -> None:
        token, request = int(drawn.token[row]), growing.request
        self._written_tokens += 1
        growing.add(token, _logprobs(drawn, row) if request.logprobs else None)
        if growing.reason is not None:
            self._lanes.free(growing)
        elif request.constraint is not None:
            request.constraint.accept(token)


def _logprobs(drawn: Drawn, row: int) -> Logprobs:
    top = zip(drawn.top_tokens[row].tolist(), drawn.top_logprobs[row].tolist(), strict=True)
    return Logprobs(float(drawn.logprob[row]), tuple(top))
