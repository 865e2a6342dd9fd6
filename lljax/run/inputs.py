"""Inputs of a run besides its weights: documents, anchor markers, batches."""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import grain
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from lljax.config import Config
from lljax.data.batch import Field
from lljax.data.kinds import KINDS, RowKind
from lljax.data.loader import eval_batches, make_loader
from lljax.data.statistics import remarks, statistics
from lljax.data.template import turn_ends
from lljax.data.tokens import Documents, TokenStore, prepare
from lljax.errors import ConfigError
from lljax.objectives.objective import Objective
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.processes import first_then_others
from lljax.run.monitor import Unread
from lljax.training.curriculum import Stage
from lljax.training.placement import row_share, rows_of_share


def kind_of(config: Config) -> RowKind:
    """What the rows of the data are, for the objective of `config`."""
    return KINDS[OBJECTIVES[config.objective.name].kind]


def read_documents(
    config: Config, workdir: Path, tokenizer: Any, fingerprint: str, vocabulary: int
) -> Documents:
    """The tokens of the documents, from the cache in `workdir`/data or tokenized into it.

    fingerprint: the fingerprint of the tokenizer.
    vocabulary: the number of tokens that the model has.

    Raises:
      DataError: a file cannot be read, or too many rows are unusable.
    """
    documents = first_then_others(
        lambda: prepare(
            config.data,
            tokenizer,
            vocabulary,
            workdir / "data",
            tokenizer_fingerprint=fingerprint,
            progress=progress,
            kind=kind_of(config),
        )
    )
    if documents.bad:
        logging.warning(
            "%d rows could not be used: %s lists them", documents.bad, workdir / "bad_rows.jsonl"
        )
    return documents


def count_documents(
    documents: Documents, config: Config, curriculum: Iterable[Stage], tokenizer: Any
) -> dict:
    """The content of data_statistics.json; logs remarks on them for the user."""
    kind, overlong = kind_of(config), config.data.overlong
    lengths = [stage.length for stage in curriculum]
    counts = statistics(documents, overlong, lengths, kind=kind)
    for line in remarks(counts, overlong, kind=kind):
        logging.warning("%s", line)
    if counts["train"]["conversations"] and not turn_ends(tokenizer):
        logging.warning(
            "the chat template ends replies with no token: only the last reply of a conversation "
            "is trained to end"
        )
    return counts


def marker_ids(markers: Iterable[str], tokenizer: Any) -> tuple[int, ...]:
    """The token ids of `context.anchor_markers`.

    Raises:
      ConfigError: a marker is not exactly one token.
    """
    ids = []
    for marker in markers:
        tokens = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise ConfigError(
                f"context.anchor_markers: {marker!r} is {len(tokens)} tokens of this tokenizer and "
                "must be one; use another marker"
            )
        ids += tokens
    return tuple(ids)


class Batches(Protocol):
    """The training batches of a stage. `get_state` and `set_state` resume them exactly.

    reads_ahead: whether a batch can be read while the device computes the step before it.
    metrics: of the batch that `next` gave last, by name.
    """

    reads_ahead: bool
    metrics: dict[str, float]

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class PackedBatches:
    """Batches of packed documents: this process's rows of them."""

    reads_ahead = True

    def __init__(self, loader: grain.DatasetIterator):
        self._loader, self.metrics = loader, {}

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._loader)

    def get_state(self) -> Any:
        return self._loader.get_state()

    def set_state(self, state: Any) -> None:
        self._loader.set_state(state)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How documents are read for an objective. fields: what their pieces hold."""

    kind: RowKind
    fields: tuple[Field, ...]


def reading_of(objective: Objective) -> Reading:
    return Reading(KINDS[objective.kind], objective.fields)


def open_batches(
    store: TokenStore, config: Config, stage: Stage, mesh: Mesh, reading: Reading
) -> PackedBatches:
    """The training batches of a stage: this process's rows of them."""
    rows, accumulate = config.training.rows, config.training.accumulate
    loader = make_loader(
        store,
        length=stage.length,
        rows=rows * accumulate,
        packing=config.data.packing,
        overlong=config.data.overlong,
        seed=config.seed + stage.number,
        local_rows=rows_of_share(rows, accumulate, mesh),
        fields=reading.fields,
        kind=reading.kind,
    )
    return PackedBatches(loader)


def held_out_batches(
    store: TokenStore, config: Config, length: int, mesh: Mesh, reading: Reading
) -> Iterator[dict[str, np.ndarray]]:
    """The held-out batches in rows of `length` tokens: this process's rows of them."""
    share, shares = row_share(mesh)
    for batch in eval_batches(
        store,
        length=length,
        rows=config.training.rows,
        limit=config.training.eval_rows,
        fields=reading.fields,
        kind=reading.kind,
    ):
        yield {name: np.split(x, shares)[share] for name, x in batch.items()}


def progress(items: Iterator, title: str) -> Iterator:
    console = Console(file=cast(TextIO, Unread(sys.stdout)))
    return iter(track(items, description=title, transient=True, console=console))
