"""Makes, checks, measures and shows training documents.

python scripts/prepare_data.py folder ~/code/project --include='*.py' --out=data/project.jsonl
python scripts/prepare_data.py stdlib --out=data/stdlib.jsonl
python scripts/prepare_data.py validate data/project.jsonl
python scripts/prepare_data.py stats data/project.jsonl --model=lljax/assets/tiny-512
python scripts/prepare_data.py show data/project.jsonl --model=lljax/assets/tiny-512 --row=3
"""

import argparse
import collections
import sysconfig
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lljax.data import folders, formats
from lljax.data.formats import Document
from lljax.data.template import encode, with_template
from lljax.errors import ConfigError, DataError, exit_cleanly
from lljax.interop.base import open_base
from lljax.terminal import console

CONSOLE = console()
STDLIB_EXCLUDE = ("site-packages/*", "*/tests/*", "test/*", "*/test/*", "idlelib/idle_test/*", "lib2to3/*",
                  "pydoc_data/*", "config-*/*", "encodings/*")


def make(folder: Path, arguments, include, exclude) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    skipped = []
    texts = folders.documents(folder, include, exclude, repository=arguments.repository, out=arguments.out,
                              skipped=skipped)
    rows, characters = folders.write_jsonl(texts, arguments.out)
    if rows == 0:
        raise DataError(f"{folder}: no text file matches --include={','.join(include)}")
    CONSOLE.print(f"{arguments.out}: {rows:,} documents, {characters:,} characters; {len(skipped):,} files skipped "
                  "(empty, too large or no UTF-8 text)", highlight=False, markup=False, soft_wrap=True)


def folder(arguments) -> None:
    make(arguments.folder, arguments, arguments.include or ["*"], arguments.exclude)


def stdlib(arguments) -> None:
    exclude = () if arguments.with_tests else STDLIB_EXCLUDE
    make(Path(sysconfig.get_path("stdlib")), arguments, ("*.py",), (*exclude, "site-packages/*", "*/bad_coding*"))


def validate(arguments) -> None:
    rows, kinds = 0, collections.Counter()
    for row in formats.read(arguments.files):
        rows += 1
        if not isinstance(row, Document):
            kinds[row.reason] += 1
            CONSOLE.print(f"{row.file}:{row.line}: {row.reason}", highlight=False, markup=False, soft_wrap=True)
    bad = sum(kinds.values())
    CONSOLE.print(f"{rows:,} rows, {rows - bad:,} good, {bad:,} bad", highlight=False)
    if bad > arguments.max_bad_fraction * rows or rows == 0:
        raise DataError(f"{bad} of {rows} rows are bad, more than --max_bad_fraction={arguments.max_bad_fraction}"
                        if rows else "no rows")


def stats(arguments) -> None:
    tokenizer = with_template(open_base(arguments.model).tokenizer())
    lengths, trained, bad = [], 0, 0
    for row in track(formats.read(arguments.files), "tokenising", transient=True, console=CONSOLE):
        try:
            tokens, mask = encode(row, tokenizer, arguments.loss_on) if isinstance(row, Document) else ((), None)
        except ValueError:
            tokens = ()
        if len(tokens):
            lengths.append(len(tokens))
            trained += int(mask.sum())
        else:
            bad += 1
    if not lengths:
        raise DataError("no usable row")
    lengths = np.asarray(lengths)
    table = Table("measure", "value")
    table.columns[1].justify = "right"
    for name, value in {"documents": len(lengths), "unusable rows": bad, "tokens": lengths.sum(),
                        "trained tokens": trained, "mean": lengths.mean(), "median": np.median(lengths),
                        "90%": np.quantile(lengths, 0.9),
                        "99%": np.quantile(lengths, 0.99), "longest": lengths.max()}.items():
        table.add_row(name, f"{value:,.0f}")
    for limit in (512, 2048, 8192, 32_768, 131_072):
        table.add_row(f"share of tokens in documents above {limit:,}",
                      f"{lengths[lengths > limit].sum() / lengths.sum():.1%}")
    CONSOLE.print(table)


def show(arguments) -> None:
    rows = [row for row in formats.read(arguments.files) if isinstance(row, Document)]
    if not 0 <= arguments.row < len(rows):
        raise ConfigError(f"--row={arguments.row}: there are rows 0 to {len(rows) - 1}")
    tokenizer = with_template(open_base(arguments.model).tokenizer())
    try:
        tokens, mask = encode(rows[arguments.row], tokenizer, arguments.loss_on)
    except ValueError as error:
        raise DataError(f"{rows[arguments.row].where}: {error}") from None
    CONSOLE.print(f"{rows[arguments.row].where}: {len(tokens):,} tokens, {mask.sum():,} trained (green, in [brackets])",
                  highlight=False, markup=False, soft_wrap=True)
    shown, edges = Text(), np.flatnonzero(np.diff(mask[:arguments.tokens].astype(int))) + 1
    for part, trained in zip(np.split(tokens[:arguments.tokens], edges), mask[[0, *edges]], strict=True):
        text = tokenizer.decode(part)
        shown.append(f"[{text}]" if trained else text, style="green" if trained else "dim")
    CONSOLE.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    makers = {}
    for name, run in (("folder", folder), ("stdlib", stdlib)):
        source = "a folder" if name == "folder" else "the Python standard library"
        makers[name] = command = commands.add_parser(name, help=f"JSONL from {source}")
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--repository", action="store_true", help="one document per folder of files")
    makers["folder"].add_argument("folder", type=Path)
    makers["folder"].add_argument("--include", action="append", help="a pattern; may be repeated")
    makers["folder"].add_argument("--exclude", action="append", default=[], help="a pattern; may be repeated")
    makers["stdlib"].add_argument("--with_tests", action="store_true", help="the library's own tests too")
    for run in (validate, stats, show):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("files", nargs="+", type=Path)
        if run is validate:
            command.add_argument("--max_bad_fraction", type=float, default=0.0)
            continue
        command.add_argument("--model", required=True, help="hub id, folder or GGUF file whose tokenizer counts")
        command.add_argument("--loss_on", choices=("assistant", "everything"), default="assistant")
        if run is show:
            command.add_argument("--row", type=int, default=0)
            command.add_argument("--tokens", type=int, default=400, help="how many are shown")
    with exit_cleanly():
        arguments = parser.parse_args()
        arguments.run(arguments)


if __name__ == "__main__":
    main()
