"""Checksums of arrays and notes: Orbax does not notice a flipped bit, these do."""

import json
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

# Bytes of an array that every device may hold for its checksum; larger arrays go in slices.
GATHERED = 1 << 28


def describe(tree, gathered: int = GATHERED) -> dict[str, list]:
    """[shape, dtype, crc32] of every leaf by its path.

    The crc covers the whole array, however it is sharded. gathered: bytes to gather at once.
    """
    return {
        jax.tree_util.keystr(path): [list(x.shape), str(x.dtype), _crc(x, gathered)]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def checksum(note: dict) -> int:
    """The crc32 of a note of a checkpoint, the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def _crc(x: jax.Array, gathered: int) -> int:
    crc = 0
    for part in _slices(x, gathered):
        local = part.is_fully_addressable or part.is_fully_replicated
        whole = np.asarray(part) if local else multihost_utils.process_allgather(part, tiled=True)
        crc = zlib.crc32(np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data, crc)
    return crc


def _slices(x: jax.Array, gathered: int) -> Iterator[jax.Array]:
    if x.nbytes <= gathered:
        yield x
        return
    rows = max(1, len(x) * gathered // x.nbytes)
    for start in range(0, len(x), rows):
        yield jax.lax.dynamic_slice_in_dim(x, start, min(rows, len(x) - start))
