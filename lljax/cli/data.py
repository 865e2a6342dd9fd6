"""Make, check, measure and show training documents.

lljax data folder ~/code/project --include='*.py' --out=data/project.jsonl
lljax data stdlib --out=data/stdlib.jsonl
lljax data validate data/project.jsonl --model=lljax/assets/tiny-512
lljax data stats data/project.jsonl --model=lljax/assets/tiny-512 --length=4096 --rows=8
lljax data show data/project.jsonl --model=lljax/assets/tiny-512 --row=3
lljax data validate data/pairs.jsonl --kind=pairs
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import model_flag, number, parser, positive, whole
from lljax.data.formats import MAX_ROW_BYTES
from lljax.errors import exit_cleanly


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand argv[0]: folder, stdlib, validate, stats or show."""
    command = parser("data", __doc__)
    commands = command.add_subparsers(required=True, dest="command")
    for name, help, add in (
        ("folder", "JSONL from a folder", _add_folder),
        ("stdlib", "JSONL from the Python standard library", _add_stdlib),
        ("validate", "list the rows that a run cannot use", _add_validate),
        ("stats", "count documents, tokens, and rows and steps an epoch", _add_stats),
        ("show", "show the tokens of a row, and which of them are trained", _add_show),
    ):
        add(commands.add_parser(name, help=help))
    arguments = command.parse_args(argv)
    with exit_cleanly(), model_flag():
        from lljax.cli import documents  # imported here: --help needs no tokenizer

        getattr(documents, arguments.command)(arguments)


def _add_folder(command: argparse.ArgumentParser) -> None:
    _add_output(command)
    command.add_argument("folder", type=Path)
    command.add_argument("--include", action="append", help="a pattern; may be repeated")
    command.add_argument(
        "--exclude", action="append", default=[], help="a pattern; may be repeated"
    )
    command.add_argument("--follow_links", action="store_true", help="links out of the folder too")


def _add_stdlib(command: argparse.ArgumentParser) -> None:
    _add_output(command)
    command.set_defaults(follow_links=False)
    command.add_argument("--with_tests", action="store_true", help="the library's own tests too")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True)
    command.add_argument(
        "--repository", action="store_true", help="one document per folder of files"
    )


def _add_validate(command: argparse.ArgumentParser) -> None:
    _add_files(command, model_required=False)
    command.add_argument("--max_bad_fraction", type=number, default=0.0)


def _add_stats(command: argparse.ArgumentParser) -> None:
    _add_files(command)
    command.add_argument("--length", type=positive, default=8192, help="tokens per row")
    command.add_argument(
        "--rows",
        type=positive,
        default=1,
        help="rows per step: training.rows x training.accumulate",
    )
    command.add_argument(
        "--overlong",
        choices=("split", "truncate", "drop"),
        help="as data.overlong; by default split for documents, otherwise drop",
    )
    command.add_argument("--no_packing", action="store_true", help="one document a row")


def _add_show(command: argparse.ArgumentParser) -> None:
    _add_files(command)
    command.add_argument(
        "--row", type=whole, default=0, help="its number among the usable rows, from 0"
    )
    command.add_argument(
        "--tokens", type=positive, default=400, help="shown at most, spread over the spans"
    )


def _add_files(command: argparse.ArgumentParser, *, model_required: bool = True) -> None:
    command.add_argument(
        "files", nargs="+", type=Path, help="JSONL, JSONL.gz or JSON files, or folders"
    )
    command.add_argument(
        "--kind",
        choices=("documents", "pairs", "judged", "prompts"),
        default="documents",
        help="what the rows are: documents, pairs of a chosen and a rejected answer, judged "
        "answers, or prompts",
    )
    command.add_argument(
        "--model",
        required=model_required,
        help="hub id, folder or GGUF file with the tokenizer and chat template to use",
    )
    command.add_argument("--loss_on", choices=("assistant", "everything"), default="assistant")
    command.add_argument(
        "--max_row_bytes", type=positive, default=MAX_ROW_BYTES, help="as data.max_row_bytes"
    )
