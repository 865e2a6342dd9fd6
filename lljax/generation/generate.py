"""Continues prompts with a model: one call of the engine."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lljax.generation.completion import Completion, Request
from lljax.generation.engine import Engine
from lljax.generation.sample import GREEDY, Sampling
from lljax.models.cache import cache_bytes
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout


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
    """Continues each of `prompts` (int [n]) by up to `tokens` tokens. See `Engine` and `Request`.

    A completion does not depend on the other prompts.
    """
    cache_dtype = cache_dtype or dtype
    # for what the prompts begin with alike: as much as one more row
    prefix = cache_bytes(model.spec, max(map(len, prompts)), cache_dtype) if prompts[1:] else 0
    engine = Engine(
        model,
        tokenizer,
        rows=rows,
        dtype=dtype,
        cache_dtype=cache_dtype,
        prefix_bytes=prefix,
        layout=layout,
    )
    return engine.run(
        Request(
            prompt=prompt.tolist(),
            tokens=tokens,
            sampling=sampling,
            numbers=(number,),
            stop=stop,
            stop_strings=stop_strings,
        )
        for number, prompt in enumerate(prompts)
    )
