"""Makes, checks, measures and shows training documents.

python scripts/prepare_data.py folder ~/code/project --include='*.py' --out=data/project.jsonl
python scripts/prepare_data.py stdlib --out=data/stdlib.jsonl
python scripts/prepare_data.py validate data/project.jsonl --model=lljax/assets/tiny-512
python scripts/prepare_data.py stats data/project.jsonl --model=lljax/assets/tiny-512 --length=4096
--rows=8 python scripts/prepare_data.py show data/project.jsonl --model=lljax/assets/tiny-512
--row=3
"""

import argparse
import contextlib
import itertools
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lljax.cli.console import console
from lljax.config import default_config
from lljax.data import folders, formats
from lljax.data.formats import BadRow, Document
from lljax.data.loader import rows_per_epoch
from lljax.data.statistics import remarks, statistics, unread_keys
from lljax.data.template import encode, with_template
from lljax.data.tokens import Documents, count_unread, prepare
from lljax.errors import ConfigError, DataError, exit_cleanly, printable
from lljax.interop.open import open_base, tokenizer_fingerprint

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
LEAST = 24  # tokens that `show` shows of a span, at least


def say(line: str) -> None:
    CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- make
def make(folder: Path, arguments, include, exclude) -> None:
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
        f"{printable(str(arguments.out))}: {rows:,} documents, {characters:,} characters; "
        f"{len(skipped):,} files skipped (empty, too large, no UTF-8 text, or links out of the "
        "folder: --follow_links)"
    )


def folder(arguments) -> None:
    make(arguments.folder, arguments, arguments.include or ["*"], arguments.exclude)


def stdlib(arguments) -> None:
    exclude = () if arguments.with_tests else STDLIB_EXCLUDE
    make(
        Path(sysconfig.get_path("stdlib")),
        arguments,
        ("*.py",),
        (*exclude, "site-packages/*", "*/bad_coding*"),
    )


# ---------------------------------------------------------------- check and measure
@contextlib.contextmanager
def prepared(arguments) -> Iterator[tuple[Documents, list[BadRow]]]:
    """The documents of `arguments.files` as a run makes them, and the rows that it cannot use."""
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
            )
        except DataError:  # no row is usable
            for row in read_bad_rows(listed):
                say(str(row))
            raise
        yield documents, read_bad_rows(listed)


def read_bad_rows(listed: Path) -> list[BadRow]:
    lines = listed.read_text().splitlines() if listed.exists() else []
    return [BadRow(**json.loads(line)) for line in lines]


def progress(rows, title):
    return track(rows, title, transient=True, console=CONSOLE)


def validate(arguments) -> None:
    if arguments.model:
        with prepared(arguments) as (documents, bad):
            rows, unread = documents.counts["train"]["rows"], documents.counts["train"]["unread"]
        unchecked = ""
    else:
        rows, bad, unread = 0, [], {}
        for row in formats.read(arguments.files, max_row_bytes=arguments.max_row_bytes):
            rows += 1
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                count_unread(row, unread, template=None)
        unchecked = "; not checked without --model: what the chat template refuses or does not show"
    for row in bad:
        say(str(row))
    for line in unread_keys(unread):
        say(line)
    say(f"{rows:,} rows, {rows - len(bad):,} good, {len(bad):,} bad{unchecked}")
    if len(bad) > arguments.max_bad_fraction * rows or rows == 0:
        raise DataError(
            f"{len(bad)} of {rows} rows are bad, more than "
            f"--max_bad_fraction={arguments.max_bad_fraction}"
            if rows
            else "no rows"
        )


def stats(arguments) -> None:
    with prepared(arguments) as (documents, bad):
        store, length, overlong = documents.train, arguments.length, arguments.overlong
        found = statistics(documents, overlong, [length])
        epoch = rows_per_epoch(
            store, length=length, packing=not arguments.no_packing, overlong=overlong
        )
    train, lengths = found["train"], store.lengths
    table = Table("measure", "value")
    table.columns[1].justify = "right"
    measures = {
        "documents": len(lengths),
        "conversations among them": train["conversations"],
        "unusable rows": len(bad),
        "tokens": lengths.sum(),
        "trained tokens": train["trained_tokens"],
        "mean": lengths.mean(),
        "median": np.median(lengths),
        "90%": np.quantile(lengths, 0.9),
        "99%": np.quantile(lengths, 0.99),
        "longest": lengths.max(),
        f"rows of {length:,} tokens an epoch": epoch,
        f"steps an epoch, {arguments.rows:,} rows each": -(-epoch // arguments.rows),
    }
    for name, value in measures.items():
        table.add_row(name, f"{value:,.0f}")
    for limit in LIMITS:
        table.add_row(
            f"share of tokens in documents above {limit:,}",
            f"{lengths[lengths > limit].sum() / lengths.sum():.1%}",
        )
    CONSOLE.print(table)
    for line in remarks(found, overlong):
        say(line)


# ---------------------------------------------------------------- show
def show(arguments) -> None:
    rows = (
        row
        for row in formats.read(arguments.files, max_row_bytes=arguments.max_row_bytes)
        if isinstance(row, Document)
    )
    row = next(itertools.islice(rows, arguments.row, None), None) if arguments.row >= 0 else None
    if row is None:
        raise ConfigError(f"--row={arguments.row}: there is no such row; they are counted from 0")
    tokenizer = with_template(open_base(arguments.model).tokenizer())
    try:
        tokens, mask = encode(row, tokenizer, arguments.loss_on)
    except ValueError as error:
        raise DataError(f"{printable(row.where)}: {error}") from None
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    spans = list(zip(np.split(tokens, edges), mask[[0, *edges]], strict=True))
    say(
        f"{printable(row.where)}: {len(tokens):,} tokens, {mask.sum():,} trained (green, in [brackets]) "
        f"in {sum(trained for _, trained in spans):,} spans"
    )
    each = (
        len(tokens)
        if len(tokens) <= arguments.tokens
        else max(LEAST, arguments.tokens // len(spans))
    )
    shown, text = spans[: max(1, arguments.tokens // each)] if each < len(tokens) else spans, Text()
    for part, trained in shown:
        decoded = excerpt(part, each, tokenizer)
        text.append(f"[{decoded}]" if trained else decoded, style="green" if trained else "dim")
    if len(shown) < len(spans):
        text.append(
            f" \u2026 {len(spans) - len(shown):,} further spans: raise --tokens \u2026",
            style="bold",
        )
    CONSOLE.print(text)


def excerpt(tokens: np.ndarray, limit: int, tokenizer) -> str:
    """The text of the first and the last of more than `limit` tokens, without terminal codes."""
    parts = [tokens] if len(tokens) <= limit else [tokens[: limit // 2], tokens[-(limit // 2) :]]
    lines = (tokenizer.decode(part).expandtabs(4).split("\n") for part in parts)
    texts = ("\n".join(map(printable, each)) for each in lines)
    return f" \u2026 {len(tokens) - limit // 2 * 2:,} tokens \u2026 ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    makers = {}
    for name, run in (("folder", folder), ("stdlib", stdlib)):
        source = "a folder" if name == "folder" else "the Python standard library"
        makers[name] = command = commands.add_parser(name, help=f"JSONL from {source}")
        command.set_defaults(run=run, follow_links=False)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument(
            "--repository", action="store_true", help="one document per folder of files"
        )
    makers["folder"].add_argument("folder", type=Path)
    makers["folder"].add_argument("--include", action="append", help="a pattern; may be repeated")
    makers["folder"].add_argument(
        "--exclude", action="append", default=[], help="a pattern; may be repeated"
    )
    makers["folder"].add_argument(
        "--follow_links", action="store_true", help="links out of the folder too"
    )
    makers["stdlib"].add_argument(
        "--with_tests", action="store_true", help="the library's own tests too"
    )
    for run, summary in (
        (validate, "name the rows that a run cannot use"),
        (stats, "count documents, tokens, and rows and steps an epoch"),
        (show, "show a row as tokens, and which of them are trained"),
    ):
        command = commands.add_parser(run.__name__, help=summary)
        command.set_defaults(run=run)
        command.add_argument(
            "files", nargs="+", type=Path, help="JSONL, JSONL.gz or JSON files, or folders"
        )
        command.add_argument(
            "--model",
            required=run is not validate,
            help="hub id, folder or GGUF file whose tokenizer and chat template are used",
        )
        command.add_argument("--loss_on", choices=("assistant", "everything"), default="assistant")
        command.add_argument(
            "--max_row_bytes",
            type=positive,
            default=formats.MAX_ROW_BYTES,
            help="as data.max_row_bytes",
        )
        if run is validate:
            command.add_argument("--max_bad_fraction", type=float, default=0.0)
        elif run is stats:
            command.add_argument("--length", type=positive, default=8192, help="tokens a row")
            command.add_argument(
                "--rows",
                type=positive,
                default=1,
                help="rows a step: training.rows x training.accumulate",
            )
            command.add_argument(
                "--overlong",
                choices=("split", "truncate", "drop"),
                default="split",
                help="as data.overlong",
            )
            command.add_argument("--no_packing", action="store_true", help="one document a row")
        else:
            command.add_argument(
                "--row", type=int, default=0, help="its number among the usable rows, from 0"
            )
            command.add_argument(
                "--tokens",
                type=positive,
                default=400,
                help="how many are shown, spread over the spans",
            )
    with exit_cleanly():
        arguments = parser.parse_args()
        arguments.run(arguments)


def positive(text: str) -> int:
    if not (value := int(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    main()
