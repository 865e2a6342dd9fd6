"""Prompts with several answers: the fields of their tokens."""

import numpy as np

from lljax.data.batch import NEXT_TOKEN, Field


def branch_positions(piece: dict[str, np.ndarray]) -> np.ndarray:
    branches = np.asarray(piece["branches"])
    n, positions = int((branches == 0).sum()), np.arange(len(branches), dtype=np.int32)
    for branch in np.unique(branches[branches > 0]):
        at = np.flatnonzero(branches == branch)
        positions[at] = n + np.arange(len(at))
    return positions


ANSWERS = (*NEXT_TOKEN, Field("branches"), Field("positions", derive=branch_positions))
