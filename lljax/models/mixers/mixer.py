"""The interface of a mixer."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import jax
from jaxtyping import Array, Float, Int
from jaxtyping import PyTree as Tree

from lljax.attention.pattern import AttentionPattern
from lljax.models.context import LayerContext
from lljax.models.flops import RowFlops, TokenFlops
from lljax.models.rope import Positions
from lljax.models.spec import DecoderSpec, LayerSpec

Operands = Tree[Float[Array, "B T ..."]]  # from `project` to `mix`
Carry = Any  # a pytree of arrays [B, ...]


class State(Protocol):
    """One layer's part of the cache (lljax.models.cache): a registered dataclass of arrays [B, ...]
    that summarizes the tokens read so far.
    """

    def write(self, update: Self, start: Int[Array, " B"]) -> Self:
        """The state after more tokens, which each row has from slot `start` on. update: what these
        tokens leave, such as `part` of another state.
        """
        ...

    def part(self, start: Int[Array, ""], T: int) -> Self:
        """What the tokens of slots `start` to `start` + T left, T being a Python int: `write` puts
        it into the state of another row that has read the same tokens before. Of a state that
        forgets single tokens, itself, right after these tokens.
        """
        ...

    def grow(self, slots: int) -> Self:
        """The state with room for `slots` tokens; itself if its size does not depend on them."""
        ...

    def fork(self, B: int, S: int) -> Self:
        """The states of B rows that continue the first row of this one, with room for S tokens of
        their own: empty if the mixer also reads `context.trunk`; copies if the state is small.
        """
        ...


class Mixer(Protocol):
    """The token-mixing half of a decoder layer (not the MLP): tokens read the tokens before them.

    A layer calls `project`, `mix` and `output` one after the other. `project` and `output` treat
    each token alone, so that `memory.tile` bounds how many tokens they hold at a time. A row whose
    whole layer can run tile by tile goes through `first_carry` and `mix_tile` in place of `mix`.

    Parameters are declared in the constructor (lljax.models.declare), `hf` being their prefix in
    the HF checkpoint.
    """

    hf_name: ClassVar[str]
    """Name of the module below its layer in a HF checkpoint."""

    refused_modes: ClassVar[Mapping[str, str]]
    """Context-parallel modes (lljax.attention.context_parallel) that it cannot run under, each with
    the reason."""

    ordered: ClassVar[bool]
    """Whether a device must hold consecutive tokens, in the order of the row: no zigzag order; and
    whole rows if they have answers that share a prompt."""

    branches: ClassVar[bool]
    """Whether it can read rows of several answers that share a prompt."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str) -> None: ...

    def project(
        self, x: Float[Array, "B T D"], positions: Positions, dropout_key: jax.Array | None
    ) -> Operands:
        """The operands of `mix`, from normalized tokens x and their positions."""
        ...

    def mix(
        self, operands: Operands, context: LayerContext, state: Any | None
    ) -> tuple[Float[Array, "B T X"], Any | None]:
        """Tokens mixed along the row under `context.mask`, and the state after them. state: the
        state of this layer before them; None without a cache, and then None is returned too.
        """
        ...

    def output(
        self, mixed: Float[Array, "B T X"], dropout_key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """The part of the layer that is added to the residual."""
        ...

    def first_carry(
        self, project: Callable[[tuple], Operands], xs: tuple, context: LayerContext
    ) -> Carry | None:
        """The carry into the first tile of every device; None if a row of this context cannot go
        tile by tile.

        xs: arrays [B, T, ...] of the row, x first. project: maps xs, or the same token slice of
        each, to operands.
        """
        ...

    def mix_tile(
        self, operands: Operands, context: LayerContext, carry: Carry
    ) -> tuple[Float[Array, "B t X"], Carry]:
        """`mix` of a tile, given the previous tile's carry; returns the output and the next carry.

        context.mask: the mask of the tile. Padding tokens of the last tile have the key index NEVER
        (lljax.attention.mask).
        """
        ...

    def token_flops(self) -> TokenFlops:
        """Products of one token with the parameters, of all stacked layers."""
        ...

    def row_flops(self, T: int, pattern: AttentionPattern) -> RowFlops:
        """Products between the T tokens of a row of one document, in one layer."""
        ...

    @staticmethod
    def abstract_state(spec: DecoderSpec, layer: LayerSpec, B: int, S: int, dtype: Any) -> State:
        """The state of one layer for B rows of S tokens, of `jax.ShapeDtypeStruct`s; it starts as
        zeros. dtype: the dtype of arrays that grow with S; int8 for eight bits and scales.
        """
        ...
