"""Attention: which keys a query sees (`Mask`), how it is computed (`attend`, over a table of
implementations), and over which devices (`attend_parallel`).
"""

from lljax.attention.attend import IMPLEMENTATIONS, attend
from lljax.attention.context_parallel import attend_parallel
from lljax.attention.forked import Trunk, attend_forked
from lljax.attention.mask import Mask, causal
from lljax.attention.options import AttentionOptions
from lljax.attention.shifted import attend_shifted
from lljax.attention.streamed import attend_tile, first_halo, tile_reach

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionOptions",
    "Mask",
    "Trunk",
    "attend",
    "attend_forked",
    "attend_parallel",
    "attend_shifted",
    "attend_tile",
    "causal",
    "first_halo",
    "tile_reach",
]
