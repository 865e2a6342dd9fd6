"""The work of `lljax evaluate`: models measured side by side."""

import argparse
import dataclasses
import errno
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from lljax.cli.console import console
from lljax.config import Config, default_config
from lljax.data.kinds import DOCUMENTS
from lljax.data.template import with_template
from lljax.data.token_store import TokenStore
from lljax.data.tokens import FIELDS, prepare
from lljax.errors import ConfigError, printable
from lljax.evaluation import perplexity, registry, results, zeroscrolls
from lljax.evaluation.batched_generation import (
    EvalModel,
    EvalSettings,
    score_tasks,
    too_short,
)
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.scores import Score
from lljax.evaluation.tables import tables
from lljax.evaluation.task import Example, Sources, Task, TooShort, refuse_beyond
from lljax.interop.open import end_tokens, tokenizer_fingerprint
from lljax.models.by_layer import split_layers
from lljax.models.decoder import Decoder
from lljax.report.page import write_report
from lljax.run.inputs import kind_of
from lljax.run.open import ComparedModels, open_base_models, open_export, open_run_models
from lljax.run.restore import read_config

CONSOLE = console()


def evaluate(arguments: argparse.Namespace) -> None:
    """Measures every model at every length and writes tables, predictions and the report.

    arguments: the flags of `lljax evaluate`.

    Raises:
      ConfigError: an unknown task, or a length or folder that cannot be used.
    """
    protocols, tasks = read_tasks(arguments)
    candidates = (
        open_run_models(arguments.workdir)
        if arguments.workdir
        else open_base_models(arguments.model, arguments.adapter)
    )
    exports = [open_export(path, candidates.dtype) for path in arguments.exports.split(",") if path]
    candidates = dataclasses.replace(candidates, models=[*candidates.models, *exports])
    spec = candidates.extended
    lengths = read_lengths(arguments.lengths) or doublings(
        spec.rope.original_length, spec.max_length
    )
    refuse_beyond(lengths[-1], spec.max_length, "--lengths")
    out = arguments.out or arguments.workdir
    check_writable(out)
    base: Any = candidates.base
    tokenizer = base.tokenizer()
    store = held_out(arguments, base, tokenizer, out) if protocols else None
    texts = read_held_out(protocols, lengths, store, arguments.documents)
    tokenizer = with_template(tokenizer)
    settings = EvalSettings(
        tokenizer=tokenizer,
        samples=arguments.samples,
        seed=arguments.seed,
        chat=arguments.chat,
        stop=end_tokens(base, tokenizer),
        rows=arguments.rows,
        cache_dtype="int8" if arguments.cache == "int8" else None,
    )
    reasons = too_short(progress(tasks, "first examples") if tasks else (), lengths, settings)
    for reason in dict.fromkeys(reasons.values()):
        say(f"– {reason}")
    scores, keys = measure(candidates, texts, tasks, lengths, settings, out)
    scores = results.write(out, scores, keys)
    for table in tables(scores):
        show(table)
    say(f"Report: {write_report(out)}")


def check_writable(out: Path) -> None:
    """Makes the folder for results.

    Raises:
      ConfigError: it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(out, os.W_OK) else os.strerror(errno.EACCES)
    except FileExistsError:
        reason = os.strerror(errno.ENOTDIR)
    except (PermissionError, NotADirectoryError) as error:
        reason = error.strerror
    if reason:
        raise ConfigError(
            f"results cannot be written to {printable(str(out))} ({reason.lower()}): name another "
            "folder with --out"
        )


def measure(
    candidates: ComparedModels,
    texts: dict,
    tasks: list[Task],
    lengths: list[int],
    settings: EvalSettings,
    out: Path,
) -> tuple[list[Score], dict[str, str]]:
    """The scores of every model, and the key of each by the name that scores have.

    The models are loaded one after the other.
    """
    # no perplexity depends on it
    how = ", chat" * settings.chat + ", int8 cache" * (settings.cache_dtype is not None)
    where: dict[str, Any] = {"dtype": candidates.dtype, "layout": candidates.layout}
    scores, keys = [], {}
    with Predictions(out / "predictions.jsonl") as predictions:
        for candidate in candidates.models:
            model, name = candidate.load(), candidate.name + how
            key = candidates.key(candidate, model, settings.tokenizer)
            keys[candidate.name] = keys[name] = key
            scores += perplexities(model, candidate.name, key, texts, predictions, **where)
            evaluated = EvalModel(split_layers(model), name, key + how, **where)
            answered = list(
                score_tasks(evaluated, tasks, lengths, settings, predictions, progress=progress)
            )
            submit(out, name, key + how, answered, settings.samples, predictions)
            scores += answered
            del model, evaluated  # before the next is read
    return scores, keys


def read_tasks(arguments: argparse.Namespace) -> tuple[list[str], list[Task]]:
    """The protocols of perplexity and the other tasks that --tasks names."""
    sources = Sources(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sources)}
    )
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise ConfigError(f"--tasks={arguments.tasks}: it names no task; perplexity is one")
    protocols = [name for name in PROTOCOLS if name in names]
    return protocols, registry.find([name for name in names if name not in PROTOCOLS], sources)


def held_out(arguments: argparse.Namespace, base: Any, tokenizer: Any, out: Path) -> TokenStore:
    """The tokens of --held_out, or else of the documents that the run holds out."""
    if not arguments.held_out and not arguments.workdir:
        raise ConfigError(
            "perplexity of a --model needs documents: name JSONL files with --held_out"
        )
    config: Config = read_config(arguments.workdir) if arguments.workdir else default_config()
    data = config.data
    kind = kind_of(config)
    if not arguments.held_out and kind.name != DOCUMENTS.name:
        raise ConfigError(
            f"--workdir={arguments.workdir}: the run was trained on {kind.noun}; perplexity needs "
            "documents: name JSONL files with --held_out"
        )
    if arguments.held_out:
        with data.unlocked():
            data.update(
                {
                    "train": tuple(arguments.held_out.split(",")),
                    "valid": (),
                    "valid_fraction": 0.0,
                    "loss_on": "everything",
                }
            )
    documents = prepare(
        data,
        tokenizer,
        base.config["vocab_size"],
        (out if arguments.held_out else arguments.workdir) / "data",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        progress=progress,
        fields={"train": "--held_out"} if arguments.held_out else FIELDS,
    )
    return documents.train if arguments.held_out else documents.valid


def read_held_out(
    protocols: list[str], lengths: list[int], store: TokenStore | None, documents: int
) -> dict[tuple[str, int], Any]:
    """The token rows of each protocol at each length; empty if the length is too short for it."""
    texts = {}
    for protocol in protocols:
        assert store is not None  # it is made if there are protocols
        for length in lengths:
            try:
                texts[protocol, length] = perplexity.read(
                    protocol, store, length, max(lengths), documents
                )
            except TooShort as error:
                say(f"– {error}")
                texts[protocol, length] = ()
    return texts


def perplexities(
    model: Decoder, name: str, key: str, texts: dict, predictions: Predictions, **where: Any
) -> Iterator[Score]:
    """The perplexity of every protocol and length, measured or read from `predictions`.

    texts: as `read_held_out` returns them.
    """
    same = {}  # protocol: digest of the tokens that it predicts at every length
    for (protocol, _), pieces in texts.items():
        if len(pieces) and (predicted := perplexity.predicted(protocol, pieces)) is not None:
            same[protocol] = _digest(predicted)[:12]
    items = progress(texts.items(), f"{name}: perplexity") if texts else ()
    for (protocol, length), pieces in items:
        value = math.nan
        if len(pieces):
            read = Example(str(len(pieces)), _digest(pieces), (), 0)
            value = parsed(predictions.find(key, protocol, length, read))
            if math.isnan(value):
                value = perplexity.measure(protocol, model, pieces, length, **where)
                predictions.add(key, protocol, length, read, repr(value))
        yield Score(name, protocol, length, value, len(pieces), texts=same.get(protocol, ""))


def _digest(pieces: np.ndarray) -> str:
    return hashlib.sha256(pieces.tobytes()).hexdigest()


def parsed(text: str | None) -> float:
    """The number that a prediction is; NaN if it is none."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def submit(
    out: Path,
    name: str,
    key: str,
    scores: list[Score],
    samples: int | None,
    predictions: Predictions,
) -> None:
    """Writes the ZeroSCROLLS leaderboard file of each length at which every example of all ten
    tasks was answered.
    """
    for length in dict.fromkeys(score.length for score in scores):
        answered = {
            score.task.removeprefix("zeroscrolls_test/"): score
            for score in scores
            if score.length == length
            and score.task.startswith("zeroscrolls_test/")
            and score.samples
        }
        # some tasks were not asked for, or do not fit the length
        if answered.keys() != zeroscrolls.TASKS.keys():
            continue
        path = out / f"zeroscrolls-{results.file_name(name)}-{length}.csv"
        if samples is not None and any(score.samples >= samples for score in answered.values()):
            say(
                f"– {path.name} is not written: the leaderboard takes all examples, and "
                f"--samples={samples} may leave some out"
            )
        else:
            zeroscrolls.write_submission(
                path,
                {
                    short: predictions.of(key, score.task, length)
                    for short, score in answered.items()
                },
            )


def read_lengths(text: str) -> list[int]:
    """From "512,4k": [512, 4096]."""
    try:
        lengths = {
            int(word[:-1]) * 1024 if word.endswith("k") else int(word)
            for word in text.lower().split(",")
            if word
        }
    except ValueError:
        lengths = {0}
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"--lengths={text:.60}: comma-separated numbers of tokens, such as 512,4k"
        )
    return sorted(lengths)


def doublings(first: int, last: int) -> list[int]:
    """`first`, twice `first`, four times `first` ... and `last`."""
    lengths = [min(first, last)]
    while lengths[-1] < last:
        lengths.append(min(2 * lengths[-1], last))
    return lengths


def say(text: str) -> None:
    CONSOLE.print(printable(text), highlight=False, markup=False)


def show(content: dict) -> None:
    """Prints a table of lljax.evaluation.tables."""
    table = Table(*content["columns"], caption=content["caption"])
    for row in content["rows"]:
        table.add_row(*row)
    CONSOLE.print(table)


def progress(items: Any, title: str) -> Any:
    """The items with a progress bar in a terminal, else under a line with the title."""
    if not CONSOLE.is_terminal:
        say(title)
        return items
    return track(items, title, console=CONSOLE, transient=True)
