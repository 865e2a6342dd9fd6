"""Batches: an endless shuffled stream for training, a finite ordered one for evaluation."""

from collections.abc import Iterator

import grain
import numpy as np

from lljax.data.batch import NEXT_TOKEN, Field
from lljax.data.packing import Pieces, pack, row_of
from lljax.data.tokens import TokenStore
from lljax.errors import DataError


def make_loader(
    store: TokenStore,
    *,
    length: int,
    rows: int,
    packing: bool,
    overlong: str,
    seed: int,
    mine: np.ndarray | None = None,
    fields: tuple[Field, ...] = NEXT_TOKEN,
) -> grain.DatasetIterator:
    """An endless iterator of batches, dicts of int32 [rows, length]: tokens, targets, segments,
    positions.

    mine: the numbers of the rows that are wanted of each batch, by default all. The order is a
      function of the seed; each epoch has its own. `get_state()` and `set_state()` resume it
      exactly; the state is JSON, and the same whatever is wanted.

    Every process packs the whole stream, so that batches and state do not depend on how many there
    are. It costs each a
    copy of the tokens of all while the device computes: 13 million tokens a CPU second in rows of
      8k, 50 in rows of 1M.

    Raises:
      DataError: no document leaves a piece to train on.
    """
    pieces = Pieces(store, length, overlong)
    if not len(pieces):
        counts = pieces.counts()
        raise DataError(
            f"data.train leaves no piece of at most {length} tokens "
            f"(data.overlong={overlong!r}): {counts['dropped']} of {len(store)} documents "
            f"are longer, {counts['untrained']} have no trained token within them: set "
            "data.overlong='split', or use longer rows"
        )
    dataset = grain.MapDataset.source(pieces).shuffle(seed=seed % 2**32).repeat()
    # Reading ahead would be lost work on every resume, and reading is a copy from mapped memory.
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))

    def stack(batch):
        return {
            name: np.stack([batch[i][name] for i in (range(rows) if mine is None else mine)])
            for name in batch[0]
        }

    return iter(
        pack(stream, length, packing=packing, fields=fields).batch(
            rows, drop_remainder=True, batch_fn=stack
        )
    )


def rows_per_epoch(
    store: TokenStore, *, length: int, packing: bool, overlong: str, seed: int = 0
) -> int:
    """The number of rows that an epoch of `make_loader` fills; other seeds pack a few more or
    less.
    """
    pieces = Pieces(store, length, overlong)
    if not packing or not len(pieces):
        return len(pieces)
    order = grain.MapDataset.source(pieces).shuffle(seed=seed).to_iter_dataset()
    return sum(1 for _ in pack(order, length, packing=packing))


def eval_batches(
    store: TokenStore,
    *,
    length: int,
    rows: int,
    limit: int,
    fields: tuple[Field, ...] = NEXT_TOKEN,
) -> Iterator[dict[str, np.ndarray]]:
    """The first `limit` pieces of the held-out documents, in order, one piece a row; the last batch
    is filled up with padding.
    """
    pieces = Pieces(store, length, "split")
    nothing = np.zeros(0, np.int32)
    empty = row_of({"tokens": nothing, "targets": nothing}, length, fields)
    count = min(limit, len(pieces))
    for start in range(0, count, rows):
        numbers = range(start, min(start + rows, count))
        batch = [row_of(pieces[i], length, fields) for i in numbers]
        batch += [empty] * (rows - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in empty}
