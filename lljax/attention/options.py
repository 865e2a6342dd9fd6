"""The options of an attention call: all but queries, keys, values and their mask."""

import dataclasses

import jax
from jaxtyping import Array, Float

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """scale: factor of the scores. softcap: see `lljax.attention.softcap`; None for none.
    sinks: a score per query head beside the scores of its keys, which takes weight and has no
      value (GPT-OSS); None for none.
    implementation: "auto", the first of `lljax.attention.attend.IMPLEMENTATIONS` that can serve, or
      a key of it.
    platform: cpu | gpu | tpu, to choose for; None for the backend of this process.
    """

    scale: float = dataclasses.field(metadata=_STATIC)
    softcap: float | None = dataclasses.field(default=None, metadata=_STATIC)
    sinks: Float[Array, " N"] | None = None
    implementation: str = dataclasses.field(default="auto", metadata=_STATIC)
    platform: str | None = dataclasses.field(default=None, metadata=_STATIC)

    def replace(self, **changes) -> "AttentionOptions":
        return dataclasses.replace(self, **changes)

    def of_heads(self, heads: slice) -> "AttentionOptions":
        """The options of some of the query heads."""
        return self if self.sinks is None else self.replace(sinks=self.sinks[heads])
