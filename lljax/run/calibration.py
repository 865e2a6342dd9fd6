"""The rows that a model is quantized on: documents of a run, or of other files."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from lljax.compression.layers import Rows
from lljax.config import Config
from lljax.data.kinds import DOCUMENTS
from lljax.data.loader import make_loader, rows_per_epoch
from lljax.data.token_store import TokenStore
from lljax.data.tokens import FIELDS, prepare
from lljax.errors import ConfigError
from lljax.interop.base import Base
from lljax.interop.open import tokenizer_fingerprint
from lljax.run.inputs import kind_of, progress

TOKENS = 1 << 19  # of all rows, unless their number is given
LEAST_ROWS = 8


def calibration_rows(
    config: Config,
    base: Base,
    cache: Path,
    *,
    files: tuple[str, ...],
    length: int,
    rows: int | None,
    seed: int,
) -> Rows:
    """Packed rows of `length` tokens.

    config: of the run, or the default. cache: the folder of tokens. files: documents in place of
    the run's training documents. rows: None for about `TOKENS` tokens. seed: of the choice.

    Raises:
      ConfigError: there are no files, and the run was trained on no documents.
      DataError: the files cannot be used.
    """
    store = _store(config, base, cache, files)
    how: dict[str, Any] = {"length": length, "packing": True, "overlong": "split", "seed": seed}
    wanted, there = rows or max(LEAST_ROWS, TOKENS // length), rows_per_epoch(store, **how)
    count = min(wanted, there)
    if count < wanted:
        logging.warning("the documents fill %d rows of %d tokens, not %d", there, length, wanted)
    loader = make_loader(store, rows=1, **how)
    batches = [next(loader) for _ in range(count)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([batch[name] for batch in batches]).astype(np.int32)

    return Rows(*map(joined, ("tokens", "segments", "positions")))


def _store(config: Config, base: Base, cache: Path, files: tuple[str, ...]) -> TokenStore:
    data = config.data
    if not files and not data.train:
        raise ConfigError("--model without --data: name JSONL files of documents with --data")
    if not files and kind_of(config).name != DOCUMENTS.name:
        raise ConfigError(
            f"the run was trained on {kind_of(config).noun}, and calibration reads documents: name "
            "JSONL files with --data"
        )
    if files:
        with data.unlocked():
            data.update(
                {
                    "train": files,
                    "valid": (),
                    "valid_fraction": 0.0,
                    "loss_on": "everything",
                    "max_bad_fraction": 1.0,  # counted below
                }
            )
    tokenizer = base.tokenizer()
    documents = prepare(
        data,
        tokenizer,
        base.config["vocab_size"],
        cache,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        progress=progress,
        fields={"train": "--data"} if files else FIELDS,
    )
    if documents.bad:
        listed = cache.parent / "bad_rows.jsonl"
        first = listed.read_text().splitlines()[:1] if listed.is_file() else []
        logging.warning(
            "%d rows of the documents could not be used%s",
            documents.bad,
            f", such as {first[0]}" if first else "",
        )
    return documents.train
