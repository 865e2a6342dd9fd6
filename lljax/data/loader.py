"""Batches: an endless shuffled stream for training, a finite ordered one for evaluation."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np

from lljax.data.batch import NEXT_TOKEN, Field
from lljax.data.kinds import DOCUMENTS, RowKind
from lljax.data.packing import pack, row_of
from lljax.data.token_store import TokenStore
from lljax.errors import DataError


def make_loader(
    store: TokenStore,
    *,
    length: int,
    rows: int,
    packing: bool,
    overlong: str,
    seed: int,
    local_rows: np.ndarray | None = None,
    fields: tuple[Field, ...] = NEXT_TOKEN,
    kind: RowKind = DOCUMENTS,
) -> grain.DatasetIterator:
    """An endless iterator of batches, dicts of arrays [rows, length]: the fields of the objective,
    segments and positions.

    local_rows: numbers of the rows of every batch that this process reads; None for all.
    fields: of the objective.
    kind: of the rows in the store. Prompts are not packed; a batch of them has tokens
      [rows, length] padded with 0, their number `lengths` [rows], and `documents` [rows], their
      numbers in the store.

    The order is a function of the seed, and differs from epoch to epoch. `get_state()` and
    `set_state()` resume it exactly; the state is JSON and does not depend on `local_rows`.

    Every process packs the whole stream, so that batches and state do not depend on the number of
    processes. The price is a copy of all tokens in each process while the device computes: 13
    million tokens per CPU second in rows of 8k, 50 million in rows of 1M.

    Raises:
      DataError: no document leaves a piece to train on.
      ConfigError: the kind of rows does not serve `overlong`.
    """
    pieces = kind.pieces(store, length, overlong)
    if not len(pieces):
        counts = pieces.counts()
        other = next(value for value in kind.overlong if value != "drop")
        advice = f"set data.overlong={other!r}, or " if other != overlong else ""
        raise DataError(
            f"data.train leaves no piece of at most {length} tokens "
            f"(data.overlong={overlong!r}): {counts['dropped']} of {len(store)} {kind.name} "
            f"are longer, {counts['untrained']} have no trained token within them: {advice}use "
            "longer rows"
        )
    dataset = grain.MapDataset.source(cast(Any, pieces)).shuffle(seed=seed % 2**32).repeat()
    # Reading ahead would be lost at every resume, and reading is a copy from mapped memory.
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))

    numbers = range(rows) if local_rows is None else local_rows

    def stack(batch: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([batch[i][name] for i in numbers]) for name in batch[0]}

    filled = (
        pack(stream, length, packing=packing, fields=fields)
        if kind.targets
        else stream.map(functools.partial(_prompt_row, T=length))
    )
    return iter(filled.batch(rows, drop_remainder=True, batch_fn=stack))


def _prompt_row(piece: dict, T: int) -> dict[str, np.ndarray]:
    n = len(piece["tokens"])
    return {
        "tokens": np.pad(piece["tokens"], (0, T - n)),
        "lengths": np.asarray(n, np.int32),
        "documents": np.asarray(piece["document"], np.int32),
    }


def rows_per_epoch(
    store: TokenStore,
    *,
    length: int,
    packing: bool,
    overlong: str,
    seed: int = 0,
    kind: RowKind = DOCUMENTS,
) -> int:
    """The number of rows in an epoch of `make_loader`; other seeds pack a few more or fewer."""
    pieces = kind.pieces(store, length, overlong)
    if not packing or not len(pieces) or not kind.targets:
        return len(pieces)
    order = grain.MapDataset.source(cast(Any, pieces)).shuffle(seed=seed).to_iter_dataset()
    return sum(1 for _ in pack(order, length, packing=packing))


def eval_batches(
    store: TokenStore,
    *,
    length: int,
    rows: int,
    limit: int,
    fields: tuple[Field, ...] = NEXT_TOKEN,
    kind: RowKind = DOCUMENTS,
    overlong: str | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The first `limit` pieces of the held-out documents, in order, one piece a row; the last batch
    is filled up with padding, of prompts with empty ones of number -1.

    overlong: None for the first value that the kind of rows serves.

    Raises:
      ConfigError: the kind of rows does not serve `overlong`.
    """
    pieces = kind.pieces(store, length, overlong or kind.overlong[0])
    if not (count := min(limit, len(pieces))):
        return
    fill = functools.partial(row_of, fields=fields) if kind.targets else _prompt_row
    nothing = {name: values[:0] for name, values in pieces[0].items() if name != "document"}
    empty = fill(nothing | {"document": -1}, length)
    for start in range(0, count, rows):
        numbers = range(start, min(start + rows, count))
        batch = [fill(pieces[i], length) for i in numbers]
        batch += [empty] * (rows - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in empty}
