"""Batches: an endless shuffled stream for training, a finite ordered one for evaluation."""

from collections.abc import Iterator

import grain
import numpy as np

from lljax.data.packing import Pieces, pack, row_of
from lljax.data.tokens import TokenStore
from lljax.errors import DataError


def make_loader(store: TokenStore, *, length: int, rows: int, packing: bool, overlong: str, seed: int,
                process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """An endless iterator of batches, dicts of int32 [rows, length]: tokens, targets, segments, positions.

    `rows` is per process. The order is a function of the seed; each epoch has its own. Processes read disjoint pieces.
    `get_state()` and `set_state()` resume it exactly; the state is JSON.

    Raises:
      DataError: no document leaves a piece to train on.
    """
    pieces = Pieces(store, length, overlong)
    if len(pieces) < process_count:
        raise DataError(f"data.train leaves {len(pieces)} pieces of at most {length} tokens (data.overlong={overlong!r}) "
                        f"for {process_count} processes: add documents, or set data.overlong='split'")
    dataset = grain.MapDataset.source(pieces).shuffle(seed=seed % 2 ** 32)[process_index::process_count].repeat()
    # Reading ahead would be lost work on every resume, and reading is a copy from mapped memory.
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    return iter(pack(stream, length, packing=packing).batch(rows, drop_remainder=True))


def eval_batches(store: TokenStore, *, length: int, rows: int, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """The first `limit` pieces of the held-out documents, in order, one piece a row; the last batch filled up with
    padding."""
    pieces = Pieces(store, length, "split")
    empty = row_of({"tokens": np.zeros(0, np.int32), "targets": np.zeros(0, np.int32)}, length)
    for start in range(0, min(limit, len(pieces)), rows):
        chosen = [row_of(pieces[i], length) for i in range(start, min(start + rows, limit, len(pieces)))]
        chosen += [empty] * (rows - len(chosen))
        yield {key: np.stack([row[key] for row in chosen]) for key in empty}
