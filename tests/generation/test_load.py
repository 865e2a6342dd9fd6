"""Many requests of all kinds at once: each answer, and what is left of them."""

import collections
import dataclasses
import gc

import jax
import numpy as np
import pytest
from generation.cases import CHUNK, adapted, build, by_layer

from lljax.generation.completion import Request
from lljax.generation.engine import Engine
from lljax.generation.generate import generate
from lljax.generation.sample import GREEDY, Sampling

REQUESTS, AT_ONCE = 200, 16
SAMPLINGS = (
    GREEDY,
    Sampling(temperature=1.0, top_k=20, repetition=1.2),
    Sampling(temperature=0.7, top_p=0.8),
    Sampling(temperature=2.0, min_p=0.05),
)


def random_requests(count: int, adapters: tuple[str | None, ...], seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt=rng.integers(0, 61, rng.integers(1, 5 * CHUNK)).tolist(),
            tokens=int(rng.integers(1, 40)),
            sampling=dataclasses.replace(SAMPLINGS[i % len(SAMPLINGS)], seed=i),
            numbers=(0,),  # as `generate` numbers its first prompt
            adapter=adapters[int(rng.integers(len(adapters)))],
        )
        for i in range(count)
    ]


def live() -> collections.Counter:
    """Shapes and dtypes of the arrays on all devices."""
    gc.collect()
    return collections.Counter((x.shape, str(x.dtype)) for x in jax.live_arrays())


@pytest.mark.slow
def test_answers_under_load_equal_generate_and_nothing_is_left_of_them():
    """16 at a time, every seventh cancelled while it waits, is read or is written."""
    base = by_layer(build())
    models = {None: base} | {
        f"adapter {i}": adapted(base, i, roles, rank=i, alpha=4.0, targets=("q_proj", "down_proj"))
        for i, roles in ((1, ()), (2, ("norm",)), (3, ("embed", "norm")))
    }
    requests = random_requests(REQUESTS, tuple(models), seed=0)
    engine = Engine(models[None], rows=AT_ONCE, chunk=CHUNK)
    for name, model in models.items():
        if name is not None:
            engine.add_adapter(name, model)
    engine.run(requests)  # whatever a first answer leaves, such as constants of programs
    idle = live()
    rng = np.random.default_rng(1)
    growing = [engine.submit(request) for request in requests]
    cancelled = growing[::7]
    turns = {id(row): int(rng.integers(0, 400)) for row in cancelled}
    turn, more = 0, True
    while more:
        for row in cancelled:
            if turns[id(row)] == turn:
                engine.cancel(row)
        more = engine.step()
        counts = engine.counts()
        assert counts.reading + counts.writing <= AT_ONCE
        turn += 1
    assert (counts.waiting, counts.reading, counts.writing) == (0, 0, 0)
    assert live() == idle
    ended = collections.Counter(row.reason for row in growing)
    assert ended["cancelled"] and ended["length"] >= REQUESTS - len(cancelled)
    for row, request in zip(growing, requests, strict=True):
        (alone,) = generate(
            models[request.adapter],
            [np.asarray(request.prompt)],
            tokens=request.tokens,
            sampling=request.sampling,
        )
        if row.reason == "cancelled":
            assert row.tokens == alone.tokens[: len(row.tokens)]
        else:
            assert row.completion() == alone
