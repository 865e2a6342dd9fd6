"""Make, check, measure and show training documents.

lljax data folder ~/code/project --include='*.py' --out=data/project.jsonl
lljax data stdlib --out=data/stdlib.jsonl
lljax data validate data/project.jsonl --model=lljax/assets/tiny-512
lljax data stats data/project.jsonl --model=lljax/assets/tiny-512 --length=4096 --rows=8
lljax data show data/project.jsonl --model=lljax/assets/tiny-512 --row=3
lljax data validate data/pairs.jsonl --kind=pairs
lljax data tasks --tasks=keychain,needle,ruler/vt --model=lljax/assets/tiny-512 \\
    --lengths=1k,2k,4k --examples=64 --out=data/tasks.jsonl
lljax data preferences --tasks=keychain,ruler/vt --model=lljax/assets/tiny-512 --lengths=4k \\
    --out=data/preferences.jsonl
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import model_flag, number, parser, positive, whole
from lljax.data.formats import MAX_ROW_BYTES
from lljax.errors import exit_cleanly


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand argv[0]: folder, stdlib, validate, stats, show, tasks or preferences."""
    command = parser("data", __doc__)
    commands = command.add_subparsers(required=True, dest="command")
    for name, help, add in (
        ("folder", "JSONL from a folder", _add_folder),
        ("stdlib", "JSONL from the Python standard library", _add_stdlib),
        ("validate", "list the rows that a run cannot use", _add_validate),
        ("stats", "count documents, tokens, and rows and steps an epoch", _add_stats),
        ("show", "show the tokens of a row, and which of them are trained", _add_show),
        ("tasks", "prompts and answers of long tasks, for rewards", _add_tasks),
        ("preferences", "right and wrong answers to long tasks", _add_tasks),
    ):
        add(commands.add_parser(name, help=help))
    arguments = command.parse_args(argv)
    with exit_cleanly(), model_flag():
        # Imported here: --help needs no tokenizer.
        if arguments.command in ("tasks", "preferences"):
            from lljax.cli import make_rows as work
        else:
            from lljax.cli import documents as work

        getattr(work, arguments.command)(arguments)


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


def _add_tasks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tasks", required=True, help="comma-separated: keychain, needle, passkey, ruler, ruler/vt"
    )
    command.add_argument(
        "--model", required=True, help="hub id, folder or GGUF file with the tokenizer"
    )
    command.add_argument("--lengths", required=True, help="comma-separated tokens (4k is 4,096)")
    command.add_argument("--examples", type=positive, default=64, help="rows of a task and length")
    command.add_argument("--seed", type=whole, default=0, help="0 to 999")
    command.add_argument("--haystack", type=Path, help="a text to hide needles in")
    command.add_argument("--out", type=Path, required=True)
    chat = command.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="prompts are messages: the default if the tokenizer has a chat template",
    )
    chat.add_argument(
        "--no_chat", dest="chat", action="store_false", default=None, help="prompts are texts"
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
