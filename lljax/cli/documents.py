"""The work of `lljax data`: training documents in files."""

import argparse
import contextlib
import itertools
import json
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lljax.cli.console import console
from lljax.config import default_config
from lljax.data import folders, formats
from lljax.data.formats import BadRow
from lljax.data.kinds import KINDS, Row
from lljax.data.loader import rows_per_epoch
from lljax.data.preferences import CHOSEN, REJECTED, ROLES
from lljax.data.statistics import remarks, statistics, unread_keys
from lljax.data.template import with_template
from lljax.data.tokens import Documents, count_unread, prepare
from lljax.errors import ConfigError, DataError, counted, printable
from lljax.interop.open import open_base, tokenizer_fingerprint
from lljax.parallel.rounding import cdiv

CONSOLE = console()
STDLIB_EXCLUDE = (
    "site-packages/*",
    "*/tests/*",
    "test/*",
    "*/test/*",
    "idlelib/idle_test/*",
    "lib2to3/*",
    "pydoc_data/*",
    "config-*/*",
    "encodings/*",
)
LIMITS = (512, 2048, 8192, 32_768, 131_072)
MIN_TOKENS = 24  # of a span that `show` shows


def say(line: str) -> None:
    CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- make
def folder(arguments: argparse.Namespace) -> None:
    """JSONL from the text files of a folder."""
    _make(arguments.folder, arguments, arguments.include or ["*"], arguments.exclude)


def stdlib(arguments: argparse.Namespace) -> None:
    """JSONL from the standard library of this Python."""
    exclude = () if arguments.with_tests else STDLIB_EXCLUDE
    _make(
        Path(sysconfig.get_path("stdlib")),
        arguments,
        ("*.py",),
        (*exclude, "site-packages/*", "*/bad_coding*"),
    )


def _make(
    folder: Path, arguments: argparse.Namespace, include: Sequence[str], exclude: Sequence[str]
) -> None:
    if not folder.is_dir():
        raise DataError(f"{printable(str(folder))}: there is no such folder")
    skipped = []
    texts = folders.documents(
        folder,
        include,
        exclude,
        repository=arguments.repository,
        out=arguments.out,
        follow_links=arguments.follow_links,
        skipped=skipped,
    )
    rows, characters = folders.write_jsonl(texts, arguments.out)
    if rows == 0:
        raise DataError(
            f"{printable(str(folder))}: no text file matches "
            f"--include={printable(','.join(include))}"
        )
    say(
        f"{printable(str(arguments.out))}: {counted(rows, 'document')}, {characters:,} characters; "
        f"{counted(len(skipped), 'file')} skipped (empty, too large, no UTF-8 text, or links "
        "out of the folder: --follow_links)"
    )


# ---------------------------------------------------------------- check and measure
@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[tuple[Documents, list[BadRow]]]:
    """The documents of `arguments.files`, tokenized as in a run, and the rows it cannot use."""
    base = open_base(arguments.model)
    tokenizer, data = base.tokenizer(), default_config().data
    data.train, data.loss_on = tuple(map(str, arguments.files)), arguments.loss_on
    data.max_row_bytes, data.max_bad_fraction = arguments.max_row_bytes, 1.0
    with tempfile.TemporaryDirectory() as run:
        listed = Path(run) / "bad_rows.jsonl"
        try:
            documents = prepare(
                data,
                tokenizer,
                base.config["vocab_size"],
                Path(run) / "data",
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                progress=progress,
                fields={},
                kind=KINDS[arguments.kind],
            )
        except DataError:  # no row is usable
            for row in read_bad_rows(listed):
                say(str(row))
            raise
        yield documents, read_bad_rows(listed)


def read_bad_rows(listed: Path) -> list[BadRow]:
    lines = listed.read_text().splitlines() if listed.exists() else []
    return [BadRow(**json.loads(line)) for line in lines]


def progress(rows: Any, title: str) -> Any:
    return track(rows, title, transient=True, console=CONSOLE)


def validate(arguments: argparse.Namespace) -> None:
    """Lists the rows that a run cannot use.

    Raises:
      DataError: there are more than --max_bad_fraction of them, or no rows.
    """
    if arguments.model:
        with prepared(arguments) as (documents, bad):
            rows, unread = documents.counts["train"]["rows"], documents.counts["train"]["unread"]
        unchecked = ""
    else:
        rows, bad, unread = _read(arguments)
        unchecked = "; not checked without --model: what the chat template refuses or does not show"
    for row in bad:
        say(str(row))
    for line in unread_keys(unread):
        say(line)
    say(f"{counted(rows, 'row')}, {rows - len(bad):,} good, {len(bad):,} bad{unchecked}")
    if rows == 0:
        raise DataError("no rows")
    if len(bad) > arguments.max_bad_fraction * rows:
        raise DataError(
            f"{len(bad)} of {rows} rows are bad, more than "
            f"--max_bad_fraction={arguments.max_bad_fraction}"
        )


def _read(arguments: argparse.Namespace) -> tuple[int, list[BadRow], dict]:
    """The number of rows, the bad ones, and the keys that nothing reads, without a tokenizer."""
    rows, bad, unread = 0, [], {}
    for row in _rows(arguments):
        rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            count_unread(row, unread, template=None)
    return rows, bad, unread


def _rows(arguments: argparse.Namespace) -> Iterator[Row | BadRow]:
    kind = KINDS[arguments.kind]
    kind.check_loss_on(arguments.loss_on)
    return formats.read(
        arguments.files, max_row_bytes=arguments.max_row_bytes, parse_row=kind.parse
    )


def stats(arguments: argparse.Namespace) -> None:
    """Counts documents and tokens, and the rows and steps of an epoch."""
    kind = KINDS[arguments.kind]
    with prepared(arguments) as (documents, bad):
        store, length = documents.train, arguments.length
        overlong = arguments.overlong or kind.overlong[0]
        summary = statistics(documents, overlong, [length], kind=kind)
        epoch = rows_per_epoch(
            store,
            length=length,
            packing=not arguments.no_packing,
            overlong=overlong,
            kind=kind,
        )
    train, lengths = summary["train"], store.lengths
    table = Table("measure", "value")
    table.columns[1].justify = "right"
    measures = {
        kind.name: len(lengths),
        "conversations among them": train["conversations"],
        "unusable rows": len(bad),
        "tokens": lengths.sum(),
        "trained tokens": train["trained_tokens"],
        "mean": lengths.mean(),
        "median": np.median(lengths),
        "90%": np.quantile(lengths, 0.9),
        "99%": np.quantile(lengths, 0.99),
        "longest": lengths.max(),
        **_answer_measures(train),
        f"rows of {length:,} tokens an epoch": epoch,
        f"steps an epoch, {counted(arguments.rows, 'row')} each": cdiv(epoch, arguments.rows),
    }
    for name, value in measures.items():
        table.add_row(name, f"{value:,.0f}")
    for limit in LIMITS:
        table.add_row(
            f"share of tokens in {kind.name} above {limit:,}",
            f"{lengths[lengths > limit].sum() / lengths.sum():.1%}",
        )
    if once := train.get("read_once"):
        table.add_row("share that sharing prompts saves", f"{once / (once + train['tokens']):.1%}")
    CONSOLE.print(table)
    for line in remarks(summary, overlong, kind=kind):
        say(line)


def _answer_measures(train: dict[str, Any]) -> dict[str, float]:
    """The measures of the answers of groups, by name; none for other kinds of rows."""
    measures = {}
    for role, answers in train.get("answers", {}).items():
        count, lengths = answers["answers"], answers["lengths"]
        measures |= {
            f"{role} answers": count,
            f"{role} answers, mean tokens": answers["tokens"] / count,
            f"{role} answers, median": lengths["p50"],
            f"{role} answers, longest": lengths["max"],
        }
    if "read_once" in train:
        measures["prompt tokens not read a second time"] = train["read_once"]
    return measures


# ---------------------------------------------------------------- show
Span = tuple[np.ndarray, bool, int]  # tokens, whether they are trained, branch
COLORS = {CHOSEN: "green", REJECTED: "red"}  # of trained tokens of a branch; others are green


def show(arguments: argparse.Namespace) -> None:
    """Shows the tokens of a row, trained ones in color and in [brackets], each answer on a line of
    its own.
    """
    row, kind = _usable_row(arguments), KINDS[arguments.kind]
    tokenizer = with_template(open_base(arguments.model).tokenizer())
    try:
        tokens, mask, branches, columns = kind.encode(row, tokenizer, arguments.loss_on)
    except ValueError as error:
        raise DataError(f"{printable(row.where)}: {error}") from None
    of_groups = branches is not None
    branches = branches if branches is not None else np.zeros(len(tokens), np.uint8)
    edges = np.flatnonzero(np.diff(mask.astype(int)) | np.diff(branches.astype(int))) + 1
    starts = [0, *edges]
    spans = list(zip(np.split(tokens, edges), mask[starts], branches[starts], strict=True))
    trained_spans = sum(trained for _, trained, _ in spans)
    roles = [ROLES[role] for role in np.unique(branches[branches > 0]).tolist()]
    colors = "chosen green, rejected red" if of_groups else "green"
    say(
        f"{printable(row.where)}: {len(tokens):,} tokens, {mask.sum():,} trained ({colors}, in "
        f"[brackets]) in {trained_spans:,} spans"
        + f"; a prompt and its answers: {', '.join(roles)}"
        * of_groups
    )
    CONSOLE.print(_spans_text(spans, len(tokens), arguments.tokens, tokenizer))
    if columns is not None:
        names = sorted(printable(name) for name in columns if name != "prompt")
        say(f"columns for reward functions: {', '.join(names) or 'none'}")


def _usable_row(arguments: argparse.Namespace) -> Row:
    rows = (row for row in _rows(arguments) if not isinstance(row, BadRow))
    row = next(itertools.islice(rows, arguments.row, None), None) if arguments.row >= 0 else None
    if row is None:
        raise ConfigError(f"--row={arguments.row}: there is no such row; they are counted from 0")
    return row


def _spans_text(spans: list[Span], tokens: int, limit: int, tokenizer: Any) -> Text:
    """The spans, of `tokens` tokens in all, shortened to about `limit` tokens."""
    a_span = tokens if tokens <= limit else max(MIN_TOKENS, limit // len(spans))
    shown = spans[: max(1, limit // a_span)] if a_span < tokens else spans
    text, before = Text(), 0
    for part, trained, branch in shown:
        if branch != before:
            text.append(f"\n{ROLES[int(branch)]}: ", style="bold")
        before = branch
        decoded = excerpt(part, a_span, tokenizer)
        color = COLORS.get(int(branch), "green")
        text.append(f"[{decoded}]" if trained else decoded, style=color if trained else "dim")
    if len(shown) < len(spans):
        text.append(
            f" \u2026 {counted(len(spans) - len(shown), 'further span')}: raise --tokens \u2026",
            style="bold",
        )
    return text


def excerpt(tokens: np.ndarray, limit: int, tokenizer: Any) -> str:
    """The text of the tokens, without terminal codes; of more than `limit`, the first and last."""
    parts = [tokens] if len(tokens) <= limit else [tokens[: limit // 2], tokens[-(limit // 2) :]]
    lines = (tokenizer.decode(part).expandtabs(4).split("\n") for part in parts)
    texts = ("\n".join(map(printable, part)) for part in lines)
    return f" \u2026 {len(tokens) - limit // 2 * 2:,} tokens \u2026 ".join(texts)
