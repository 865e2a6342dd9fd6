"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

The kinds of scaling are the table `KINDS` (kinds.py); angles.py rotates queries and keys, extend.py
stretches the RoPE of a base, hf.py reads and writes config.json.
"""

from lljax.models.rope.angles import Positions, Temperature, rotate, rotation, temperature
from lljax.models.rope.extend import dropped_fields, extend
from lljax.models.rope.hf import CHECKS, THETA, TOP_CHECKS, from_hf, reach, to_hf
from lljax.models.rope.kinds import (
    EXTENDABLE,
    KINDS,
    Frequencies,
    RopeSpec,
    frequencies,
    rotary_dims,
    yarn_magnitude,
)

__all__ = [
    "CHECKS",
    "EXTENDABLE",
    "KINDS",
    "THETA",
    "TOP_CHECKS",
    "Frequencies",
    "Positions",
    "RopeSpec",
    "Temperature",
    "dropped_fields",
    "extend",
    "frequencies",
    "from_hf",
    "reach",
    "rotary_dims",
    "rotate",
    "rotation",
    "temperature",
    "to_hf",
    "yarn_magnitude",
]
