"""Which blocks a block of the TPU kernels visits, as a table in scalar memory.

From the extremes of each block (`lljax.attention.blocks`) the device works out which span of key
blocks each query block visits, and which span of query blocks each key block. That and the extremes
are all that scalar memory holds, O(T / bq + S / bk). The grid is as long as the longest of those
visits, which is known when the program runs: windows, groups and packed documents cost their own
size. Blocks are visited in the order of their indices, so that the visited ones stand together in
whatever order the tokens came (zigzag). Indices repeat among branches: with them the order is that
of segments first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lljax.attention.blocks import Extremes, after_trunk, all_visible, any_visible, span
from lljax.attention.mask import NEVER, Index


def of_queries(q: Extremes, k: Extremes) -> "Visits":
    """The key blocks that each query block visits."""
    return Visits(q, k, lambda q, k: (any_visible(q, k), all_visible(q, k)))


def of_keys(q: Extremes, k: Extremes) -> "Visits":
    """The query blocks that each key block visits."""
    return Visits(k, q, lambda k, q: (any_visible(q, k), all_visible(q, k)))


class Visits:
    """Which blocks `there` each block `here` visits.

    The blocks there are ranked by index, anchors before all others. A visit is a span of ranks
    among the anchors, then one among the others; with branches, a span of the anchors and the
    trunk, then one of the branch. `table` holds it for every block here, with the order and all
    extremes, as flat int32.

    kinds(extremes here, extremes there) -> (`any_visible`, `all_visible`) of pairs of blocks.
    """

    def __init__(
        self,
        here: Extremes,
        there: Extremes,
        kinds: Callable[[Extremes, Extremes], tuple[jax.Array, jax.Array]],
    ):
        anchors = (
            there["near_high"] == NEVER
            if "near_high" in there
            else jnp.zeros_like(there["last"], bool)
        )
        if "trunk_low" in here or "trunk_low" in there:
            order = jnp.lexsort((there["index_low"], there["segment_low"], ~anchors), axis=1)
        else:
            order = jnp.argsort(there["index_low"] - jnp.where(anchors, NEVER, 0), axis=1)
        there = {name: jnp.take_along_axis(x, order, axis=1) for name, x in there.items()}
        every_here = {name: x[:, :, None] for name, x in here.items()}
        every_there = {name: x[:, None, :] for name, x in there.items()}
        visited, _ = kinds(every_here, every_there)
        first = jnp.arange(visited.shape[2]) < anchors.sum(1)[:, None, None]
        if "trunk_low" in here:
            first = ~after_trunk(every_here, every_there, visited & ~first)
        far_start, far_stop = span(visited & first)
        near_start, near_stop = span(visited & ~first)
        far, count = far_stop - far_start, far_stop - far_start + near_stop - near_start
        columns = {
            "order": order,
            "far_start": far_start,
            "far": far,
            "near_start": near_start,
            "count": count,
        }
        columns |= {f"here {name}": x for name, x in here.items()}
        columns |= {f"there {name}": x for name, x in there.items()}
        self.here, self.there, self.kinds = tuple(here), tuple(there), kinds
        self.starts, start = {}, 0
        for name, x in columns.items():
            self.starts[name] = start, x.shape[1]
            start += x.size
        self.table = jnp.concatenate([x.reshape(-1) for x in columns.values()])
        # 1: a block that visits none still writes its zeros
        self.longest = jnp.maximum(jnp.max(count), 1)

    def read(self, table, name: str, b: Index, n: Index):
        """The number called `name` of block `n` of row `b`."""
        start, length = self.starts[name]
        return table[start + b * length + n]

    def rank(self, table, b: Index, n: Index, step: Index):
        """The block (by rank) that block `n` visits at `step`. After the last it stays, and nothing
        more is fetched.
        """
        step = jnp.clip(step, 0, jnp.maximum(self.read(table, "count", b, n) - 1, 0))
        far = self.read(table, "far", b, n)
        return jnp.where(
            step < far,
            self.read(table, "far_start", b, n) + step,
            self.read(table, "near_start", b, n) + step - far,
        )

    def index(self, table, b: Index, n: Index, step: Index):
        """The index of that block in the array."""
        return self.read(table, "order", b, self.rank(table, b, n, step))

    def visit(self, table, b: Index, n: Index, step: Index, update: Callable[[bool], None]) -> None:
        """In a kernel, runs update(masked) if the pair of blocks may hold a visible pair of tokens;
        unmasked if it holds nothing else.
        """
        rank = self.rank(table, b, n, step)
        visited, unmasked = self.kinds(
            {name: self.read(table, f"here {name}", b, n) for name in self.here},
            {name: self.read(table, f"there {name}", b, rank) for name in self.there},
        )
        visited &= step < self.read(table, "count", b, n)
        pl.when(visited & unmasked)(lambda: update(False))
        pl.when(visited & ~unmasked)(lambda: update(True))
