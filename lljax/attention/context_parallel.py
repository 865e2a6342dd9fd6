"""Attention over tokens that are spread over the devices of the mesh axis `sequence`: a table of
modes, and the choice of the one that moves the fewest bytes.

Each is exact for every mask it takes, in value and gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import jax
from jaxtyping import Array, Float

from lljax.attention.gathered import attend_allgather, attend_ulysses, ulysses_size
from lljax.attention.halo import attend_halo, halo_size
from lljax.attention.mask import Mask
from lljax.attention.options import AttentionOptions
from lljax.attention.pattern import Groups
from lljax.attention.ring import attend_ring
from lljax.attention.shard import (
    CUT,
    CUT_HEADS,
    HEADS,
    PER_HEAD,
    HeadShare,
    Shard,
    attend_heads,
    attend_local,
    platform_options,
)
from lljax.errors import ConfigError
from lljax.parallel.rounding import round_up
from lljax.parallel.sharding import TOKENS, Layout


def attend_parallel(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    options: AttentionOptions,
    *,
    groups: Groups | None = None,
    layout: Layout | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of q over k and v, all cut by `layout` over rows, tokens and heads.

    groups: S2-Attn in groups on top of `mask`; None for every head alike.

    Raises:
      ConfigError: the mode of `layout` cannot serve a mask with branches.
    """
    options = platform_options(options, layout)
    if layout is None:
        return attend_heads(q, k, v, mask, options, HeadShare(groups))
    shape, mode = layout.mesh.shape, layout.context_parallel
    if mask.q_trunks is not None and mode != "none" and not MODES[mode].branches:
        raise ConfigError(f"mesh.context_parallel={mode!r}: {NO_BRANCHES}; use 'auto'")
    shard = Shard(shape[TOKENS], shape[HEADS], groups, layout.zigzag)
    attend = attend_local if mode == "none" else MODES[mode].attend
    return jax.shard_map(
        lambda q, k, v, mask, options: attend(q, k, v, mask, options, shard),
        mesh=layout.mesh,
        in_specs=(CUT_HEADS, CUT_HEADS, CUT_HEADS, CUT, PER_HEAD),
        out_specs=CUT_HEADS,
        check_vma=False,
    )(q, k, v, mask, options)


# ---------------------------------------------------------------- the table
NO_BRANCHES = "an answer looks back to the end of its prompt, which may be on any device"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of the layers of a model over rows of T tokens on `size` devices.

    N, K: heads per device, of `tensor` devices; where layers differ, K divides the heads of each,
    and H is the largest. key_size: numbers of the keys of a token, on a device. windows: the
    windows of the layers, None for a layer without. bytes_per: bytes per element.
    """

    T: int
    size: int
    tensor: int
    N: int
    K: int
    H: int
    key_size: int
    groups: Groups | None
    windows: Collection[int | None]
    bytes_per: int

    @property
    def local(self) -> int:
        """Tokens of a device."""
        return self.T // self.size

    @property
    def reach(self) -> int:
        """How many tokens before its own a device needs at most."""
        group, shifts = None, {0}
        if self.groups is not None:
            group, shifts = self.groups.size, {0, self.groups.shift}
        return max(
            halo_size(self.local, self.size, window=window, group=group, shift=shift)
            for window in set(self.windows)
            for shift in shifts
        )

    def key_bytes(self, tokens: float) -> float:
        """Bytes of the keys and values of so many tokens."""
        return 2 * tokens * self.key_size * self.bytes_per


@dataclasses.dataclass(frozen=True)
class Mode:
    """attend(q, k, v, mask, options, shard) -> out, on one device inside shard_map.

    received(shape) -> bytes that a device receives in the forward pass of a layer.
    refuses(shape) -> why it cannot serve; "" if it can.
    balanced: in full attention, zigzag order makes the work of the devices equal.
    gathers: every device holds the keys and values of a whole layer.
    branches: it serves rows with branches.
    """

    attend: Callable[..., jax.Array]
    received: Callable[[Shape], float]
    refuses: Callable[[Shape], str] = lambda shape: ""
    balanced: bool = False
    gathers: bool = False
    branches: bool = True


def _halo_refuses(shape: Shape) -> str:
    if shape.reach <= shape.local:
        return ""
    return f"a query looks {shape.reach} tokens back and a device holds {shape.local}"


def _ulysses_refuses(shape: Shape) -> str:
    u = ulysses_size(shape.size, shape.N, shape.K)
    if u == 1:
        heads = f"{shape.N} query and {shape.K} key/value heads"
        return f"{heads} cannot be dealt to {shape.size} devices"
    if shape.groups is not None and u * shape.tensor % 2:
        return f"dealt to {u} devices, the heads of the two halves of S2-Attn do not part"
    return ""


def _ulysses_received(shape: Shape) -> float:
    """Queries and output, keys and values in the exchange; then the keys of the other devices."""
    u = ulysses_size(shape.size, shape.N, shape.K)
    heads = 2 * (shape.N * shape.H + shape.key_size) * shape.local * shape.bytes_per
    return heads * (u - 1) / u + shape.key_bytes(shape.T - shape.local * u) / u


# In order of preference at equal cost.
MODES = {
    "halo": Mode(
        attend_halo,
        received=lambda shape: shape.key_bytes(shape.reach),
        refuses=_halo_refuses,
        branches=False,
    ),
    "ulysses": Mode(attend_ulysses, received=_ulysses_received, refuses=_ulysses_refuses),
    "allgather": Mode(
        attend_allgather,
        received=lambda shape: shape.key_bytes(shape.T - shape.local),
        balanced=True,
        gathers=True,
    ),
    "ring": Mode(
        attend_ring,
        # float32 on the way back
        received=lambda shape: shape.key_bytes(shape.T - shape.local) * 5 / 3,
        balanced=True,
    ),
}


# ---------------------------------------------------------------- the choice
def choose(
    requested: str,
    *,
    T: int,
    size: int,
    tensor: int,
    N: int,
    K: int,
    H: int,
    groups: Groups | None,
    windows: Collection[int | None],
    key_size: int | None = None,
    bytes_per: int = 2,
    gather_bytes: float = math.inf,
    refused: Mapping[str, str] | None = None,
    ordered: bool = False,
    branches: bool = False,
) -> tuple[str, bool, str]:
    """(mode, zigzag, reason) for rows of T tokens on `size` devices.

    requested: a key of `MODES` or "auto". N, K: heads of the model, dealt to `tensor` devices; see
    `Shape`. key_size: numbers of the keys of a token, of all `tensor` devices; None for K * H.
    windows: the window of each layer or None.
    gather_bytes: the most that gathered keys and values may take.
    refused: modes that a mixer of the model cannot run under, with the reason.
    ordered: a mixer needs the tokens in the order of the row.
    branches: rows hold answers that share a prompt.

    Raises:
      ConfigError: the requested mode, or no mode, can serve this model, or T cannot be cut.
    """
    if size == 1:
        return "none", False, "one device holds every token of its rows"
    if T % size:
        raise ConfigError(
            f"rows of {T} tokens cannot be cut over mesh.sequence={size}: use a multiple, such as "
            f"{round_up(T, size)}"
        )
    shape = Shape(
        T=T,
        size=size,
        tensor=tensor,
        N=N // tensor,
        K=K // tensor,
        H=H,
        key_size=(K * H if key_size is None else key_size) // tensor,
        groups=groups,
        windows=windows,
        bytes_per=bytes_per,
    )
    refusals = dict(refused or {})
    refusals |= {mode: reason for mode, row in MODES.items() if (reason := row.refuses(shape))}
    if branches:
        refusals |= {mode: NO_BRANCHES for mode, row in MODES.items() if not row.branches}
    if requested in refusals:
        raise ConfigError(
            f"mesh.context_parallel={requested!r} with rows of {T} tokens on mesh.sequence={size}: "
            f"{refusals[requested]}; use 'auto'"
        )
    mode, reason = requested, "as configured"
    if requested == "auto":
        mode, reason = _fewest_bytes(shape, refusals, gather_bytes)
    row = MODES[mode]
    zigzag = row.balanced and not ordered and groups is None and T % (2 * size) == 0
    return mode, zigzag, f"{row.received(shape) / 1e6:.1f} MB a layer and device ({reason})"


def _fewest_bytes(shape: Shape, refusals: dict[str, str], gather_bytes: float) -> tuple[str, str]:
    """(mode, reason) of the usable mode that receives the fewest bytes."""
    gathered = shape.key_bytes(shape.T)
    for mode, row in MODES.items():
        if row.gathers and gathered > gather_bytes:
            refusals[mode] = f"the keys and values of a layer are {gathered / 1e9:.1f} GB"
    usable = [mode for mode in MODES if mode not in refusals]
    if not usable:
        reasons = "; ".join(f"{mode}: {why}" for mode, why in refusals.items())
        raise ConfigError(
            f"mesh.sequence={shape.size}: no context-parallel mode serves this model ({reasons}): "
            "set mesh.sequence=1 and spread rows and weights with mesh.fsdp"
        )
    cheapest = min(usable, key=lambda mode: MODES[mode].received(shape))
    return cheapest, "fewest bytes" + "".join(f"; no {m}: {why}" for m, why in refusals.items())
