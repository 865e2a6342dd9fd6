"""Everything that a layer reads besides its input."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from lljax.attention.mask import Mask
from lljax.attention.pattern import FULL, AttentionPattern
from lljax.models.memory import EVERYTHING, Memory
from lljax.models.rope import Positions
from lljax.parallel.sharding import Layout


@dataclasses.dataclass(frozen=True)
class TrunkContext:
    """A prompt that the rows of a batch continue, as one layer sees it (`Decoder.continued`).

    state: the state of this layer after the prompt. used: tokens of the prompt, [rows].
    mask: which slots of the state each token of the batch sees.
    """

    state: Any
    used: Int[Array, " rows"]
    mask: Mask


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """The tokens [B, T] of a forward pass as one layer sees them.

    positions: RoPE rotation and query temperature of each token.
    mask: which keys a token sees in this layer, with its window or chunks; with a cache the keys
      are the slots of the cache.
    pattern: the attention pattern of the stage.
    layout: how arrays lie on a mesh; None for one device.
    memory: which values the backward pass keeps.
    start: first slot of the cache that the tokens of each row take; None without a cache.
    count: how many of the tokens of each row are real, with a cache; those after them are padding
      and must leave no trace in the state. None for all.
    trunk: the prompt that the rows share and that is not in their own states, with a cache; a mixer
      whose `State.fork` takes the prompt along ignores it. None for none.
    dropout_key: the random key of this layer; None for no dropout.
    counted: tokens whose routing is counted (lljax.models.router); None to count nothing.
    """

    positions: Positions
    mask: Mask
    pattern: AttentionPattern = FULL
    layout: Layout | None = None
    memory: Memory = EVERYTHING
    start: Int[Array, " B"] | None = None
    count: Int[Array, " B"] | None = None
    trunk: TrunkContext | None = None
    dropout_key: jax.Array | None = None
    counted: Bool[Array, "B T"] | None = None

    def replace(self, **changes) -> "LayerContext":
        return dataclasses.replace(self, **changes)
