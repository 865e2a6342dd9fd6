"""One operation over a table of implementations."""

import jax

from lljax.attention import blockwise
from lljax.attention.mask import Mask

# In order of preference. An entry takes (q, k, v, mask, *, scale).
IMPLEMENTATIONS = {"blockwise": blockwise.attend}


def attend(q, k, v, mask: Mask, *, scale: float, implementation: str | None = None) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] under `mask`; returns [B, T, N, H].

    Query head n reads key/value head n // (N / K). `implementation=None` takes the first of the table.

    Raises:
      ValueError: no implementation has that name.
    """
    if implementation is None:
        implementation = next(iter(IMPLEMENTATIONS))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask, scale=scale)
