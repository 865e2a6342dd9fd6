"""What may attend to what (`Mask`), and how it is computed (`attend`, over a table of implementations)."""

from lljax.attention.attend import IMPLEMENTATIONS, attend
from lljax.attention.mask import Mask, causal
from lljax.attention.shifted import attend_shifted

__all__ = ["IMPLEMENTATIONS", "Mask", "attend", "attend_shifted", "causal"]
