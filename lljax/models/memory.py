"""What the backward pass keeps, where it keeps it, and how much of a layer exists at one time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lljax.attention.saved import SAVED
from lljax.parallel.sharding import Layout, row_parts, token_parts

RESIDUAL = "residual"


@dataclasses.dataclass(frozen=True)
class Memory:
    """remat: full (keep a layer's residual, compute the rest again) | attention (keep the output of
    attention and its log-sum-exp as well) | none (keep everything). offload: residuals wait in the
    host's memory.
    layers_per_residual: keep the residual of every so many layers only. tile: tokens whose
      projections and MLP exist at one time on a device; 0 for all.
    """

    remat: str = "none"
    offload: bool = False
    layers_per_residual: int = 1
    tile: int = 0


EVERYTHING = Memory()


def recomputed(layer, memory: Memory, *, name: str = RESIDUAL, pieces: int = 1):
    """`layer(x, xs) -> (x, ys)` so that its backward pass keeps what `memory` says, and computes
    the rest again.

    name: of the residual; one `recomputed` inside another needs its own, or the outer one keeps
      both. pieces: in which a residual goes to the host.
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
        # The name must be on a value made inside: what comes in is kept on the device whatever the
        # policy says.
        parts = jnp.array_split(x, pieces, axis=-1)
        return layer(jnp.concatenate([checkpoint_name(part, name) for part in parts], axis=-1), xs)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)


def scan_layers(layers, x, xs, memory: Memory, layout: Layout | None):
    """Runs x through layers that differ by a repeated pattern: `layers[0]`, `layers[1]`, ..., and
    again `layers[0]`, as often as the leading axis of `xs` is long. Compiled once, however often.

    layers: functions (x, xs) -> (x, ys), one for each place of the pattern; xs: as many trees;
      returns x, and as many ys.
    """
    each, period = memory.layers_per_residual, len(layers)
    pieces = _pieces(x, layout)
    if each == 1:
        return jax.lax.scan(
            _in_turn([recomputed(layer, memory, pieces=pieces) for layer in layers]), x, xs
        )
    inner = [recomputed(layer, memory, name="inner_residual", pieces=pieces) for layer in layers]
    outer = functools.partial(
        recomputed, memory=dataclasses.replace(memory, remat="full"), pieces=pieces
    )
    if each < period:

        def cut(places):
            return tuple(tuple(places[i : i + each]) for i in range(0, period, each))

        x, ys = jax.lax.scan(
            _in_turn([outer(_in_turn(places)) for places in cut(inner)]), x, cut(xs)
        )
        return x, sum(ys, ())

    def group(x, xs):
        return jax.lax.scan(_in_turn(inner), x, xs)

    grouped = jax.tree.map(lambda a: a.reshape(-1, each // period, *a.shape[1:]), xs)
    x, ys = jax.lax.scan(outer(group), x, grouped)
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), ys)


def groups_layers(each: int, period: int, times: int) -> bool:
    """Whether `times` repeats of a pattern of `period` layers can keep one residual per `each`
    layers.
    """
    return period % each == 0 or (each % period == 0 and times % (each // period) == 0)


def _in_turn(layers):
    def run(x, xs):
        ys = []
        for layer, operands in zip(layers, xs, strict=True):
            x, y = layer(x, operands)
            ys.append(y)
        return x, tuple(ys)

    return run


def _pieces(x, layout: Layout | None) -> int:
    """In how many pieces a residual goes to the host: the TPU's compiler aborts on a copy of 4 GiB.
    Elsewhere in one, for putting it together again costs memory.
    """
    if (jax.default_backend() if layout is None else layout.platform) != "tpu":
        return 1
    devices = 1 if layout is None else token_parts(layout) * row_parts(layout.mesh)
    return -(-x.size * x.dtype.itemsize // (devices * 2**31))


def tiled(f, xs, key, memory: Memory, layout: Layout | None):
    """f(xs, key) for arrays [B, T, ...] where f acts on each token alone, `memory.tile` tokens at a
    time.
    """
    return folded(lambda carry, xs, key: (carry, f(xs, key)), None, xs, key, memory, layout)[1]


def folded(f, carry, xs, key, memory: Memory, layout: Layout | None):
    """`tiled`, and what f(carry, xs, key) -> (carry, ys) gathers up on the way: the last carry, and
    ys.
    """
    if not cuts(jax.tree.leaves(xs)[0].shape[1], memory, layout):
        return f(carry, xs, key)
    return in_tiles(f, carry, xs, key, memory, layout)


def cuts(T: int, memory: Memory, layout: Layout | None) -> bool:
    """Whether `memory.tile` cuts what a device holds of a row of T tokens."""
    return 0 < memory.tile < T // token_parts(layout)


def in_tiles(f, carry, xs, key, memory: Memory, layout: Layout | None):
    """The last carry, and ys, of f(carry, xs, key) -> (carry, ys) over the tiles of arrays [B, T,
    ...], first to last.

    Tiles are cut from what each device holds, the last one filled up with zeros; what is inside f
    is computed again in the backward pass, but for what `memory.remat` keeps of attention.
    """
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    parts, tile = token_parts(layout), memory.tile
    local = T // parts
    tiles = -(-local // tile)

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

    def one(carry, operands):
        xs, number = operands
        return f(carry, xs, None if key is None else jax.random.fold_in(key, number))

    one = jax.checkpoint(
        one,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_only_these_names(*_saved(memory)),
    )
    carry, ys = jax.lax.scan(one, carry, (jax.tree.map(cut, xs), jnp.arange(tiles)))
    return carry, jax.tree.map(join, ys)


def _saved(memory: Memory) -> tuple[str, ...]:
    return SAVED if memory.remat == "attention" else ()
