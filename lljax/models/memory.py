"""Which values the backward pass keeps, where it keeps them, and how much of a layer exists at one
time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lljax.attention.saved import SAVED
from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import Layout, row_parts, token_parts

RESIDUAL = "residual"

Layer = Callable[[Any, Any], tuple[Any, Any]]  # (x, xs) -> (x, ys)


@dataclasses.dataclass(frozen=True)
class Memory:
    """The fields of `config.memory` that a forward pass depends on.

    remat: full (keep the residual of a layer, compute the rest again) | attention (keep the output
      of attention and its log-sum-exp as well) | none (keep everything).
    offload: residuals wait in host memory.
    layers_per_residual: keep one residual for so many layers.
    tile: tokens of a device whose projections and MLP exist at one time; 0 for all.
    """

    remat: str = "none"
    offload: bool = False
    layers_per_residual: int = 1
    tile: int = 0


EVERYTHING = Memory()


def rematerialized(layer: Layer, memory: Memory, *, name: str = RESIDUAL, pieces: int = 1) -> Layer:
    """`layer` with a backward pass that keeps the values of `memory.remat` and computes the rest
    again.

    name: the name of the residual; a layer inside another one needs a different name, or the outer
    one keeps both. pieces: number of arrays in which a residual goes to the host.
    """
    if memory.remat == "none":
        return layer
    saved = _saved(memory)
    if not memory.offload:
        return jax.checkpoint(
            layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*saved)
        )
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def named(x, xs):
        # The name must be on a value computed inside: an input stays on the device whatever the
        # policy says.
        parts = jnp.array_split(x, pieces, axis=-1)
        return layer(jnp.concatenate([checkpoint_name(part, name) for part in parts], axis=-1), xs)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)


def scan_layers(
    layers: Sequence[Layer],
    x: Float[Array, "B T D"],
    xs: tuple,
    memory: Memory,
    layout: Layout | None,
) -> tuple[Float[Array, "B T D"], tuple]:
    """Runs x through layers in a repeated pattern: `layers[0]`, `layers[1]`, ..., and again
    `layers[0]`, once for each entry of the leading axis of `xs`. Compiled once for all repeats.

    xs: a tree for each layer of the pattern. Returns x, and as many trees of outputs.
    """
    group_size, period = memory.layers_per_residual, len(layers)
    pieces = _pieces(x, layout)
    if group_size == 1:
        return jax.lax.scan(
            _in_turn([rematerialized(layer, memory, pieces=pieces) for layer in layers]), x, xs
        )
    inner = [
        rematerialized(layer, memory, name="inner_residual", pieces=pieces) for layer in layers
    ]
    outer = functools.partial(
        rematerialized, memory=dataclasses.replace(memory, remat="full"), pieces=pieces
    )
    if group_size < period:

        def cut(parts):
            return tuple(tuple(parts[i : i + group_size]) for i in range(0, period, group_size))

        x, ys = jax.lax.scan(_in_turn([outer(_in_turn(group)) for group in cut(inner)]), x, cut(xs))
        return x, sum(ys, ())

    def group(x, xs):
        return jax.lax.scan(_in_turn(inner), x, xs)

    grouped = jax.tree.map(lambda a: a.reshape(-1, group_size // period, *a.shape[1:]), xs)
    x, ys = jax.lax.scan(outer(group), x, grouped)
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), ys)


def groups_layers(layers_per_residual: int, period: int, times: int) -> bool:
    """Whether `times` repeats of a pattern of `period` layers can keep one residual per
    `layers_per_residual` layers.
    """
    return period % layers_per_residual == 0 or (
        layers_per_residual % period == 0 and times % (layers_per_residual // period) == 0
    )


def _in_turn(layers: Sequence[Layer]) -> Layer:
    def run(x, xs):
        ys = []
        for layer, operands in zip(layers, xs, strict=True):
            x, y = layer(x, operands)
            ys.append(y)
        return x, tuple(ys)

    return run


def _pieces(x: jax.Array, layout: Layout | None) -> int:
    """In how many pieces a residual goes to the host: the TPU compiler aborts on a copy of 4 GiB.
    One on other platforms, because joining pieces costs memory.
    """
    if (jax.default_backend() if layout is None else layout.platform) != "tpu":
        return 1
    devices = 1 if layout is None else token_parts(layout) * row_parts(layout.mesh)
    return cdiv(x.size * x.dtype.itemsize, devices * 2**31)


def map_tiles(
    f: Callable, xs: Any, key: jax.Array | None, memory: Memory, layout: Layout | None
) -> Any:
    """f(xs, key) for arrays [B, T, ...], `memory.tile` tokens at a time; f acts on each token
    alone.
    """
    return fold_tiles(lambda carry, xs, key: (carry, f(xs, key)), None, xs, key, memory, layout)[1]


def fold_tiles(
    f: Callable, carry: Any, xs: Any, key: jax.Array | None, memory: Memory, layout: Layout | None
) -> tuple[Any, Any]:
    """`map_tiles` with a carry: the last carry, and ys, of f(carry, xs, key) -> (carry, ys)."""
    if not is_tiled(jax.tree.leaves(xs)[0].shape[1], memory, layout):
        return f(carry, xs, key)
    return scan_tiles(f, carry, xs, key, memory, layout)


def is_tiled(T: int, memory: Memory, layout: Layout | None) -> bool:
    """Whether a device holds more than `memory.tile` tokens of a row of T."""
    return 0 < memory.tile < T // token_parts(layout)


def scan_tiles(
    f: Callable, carry: Any, xs: Any, key: jax.Array | None, memory: Memory, layout: Layout | None
) -> tuple[Any, Any]:
    """The last carry, and ys, of f(carry, xs, key) -> (carry, ys) over the tiles of arrays [B, T,
    ...], first to last.

    A tile is cut from the tokens of each device, the last one padded with zeros. The backward pass
    computes the inside of f again, except the values that `memory.remat` keeps of attention.
    """
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    parts, tile = token_parts(layout), memory.tile
    local = T // parts
    tiles = cdiv(local, tile)

    def cut(x):  # [B, T, ...] -> [tiles, B, parts * tile, ...]
        x = x.reshape(B, parts, local, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * tile - local), *((0, 0),) * (x.ndim - 3)))
        x = x.reshape(B, parts, tiles, tile, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(tiles, B, parts * tile, *x.shape[4:])

    def join(y):
        y = jnp.moveaxis(y.reshape(tiles, B, parts, tile, *y.shape[3:]), 0, 2)
        return y.reshape(B, parts, tiles * tile, *y.shape[4:])[:, :, :local].reshape(
            B, T, *y.shape[4:]
        )

    def step(carry, operands):
        xs, number = operands
        return f(carry, xs, None if key is None else jax.random.fold_in(key, number))

    step = jax.checkpoint(
        step,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_only_these_names(*_saved(memory)),
    )
    carry, ys = jax.lax.scan(step, carry, (jax.tree.map(cut, xs), jnp.arange(tiles)))
    return carry, jax.tree.map(join, ys)


def _saved(memory: Memory) -> tuple[str, ...]:
    return SAVED if memory.remat == "attention" else ()
