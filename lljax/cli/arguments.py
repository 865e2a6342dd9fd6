"""Command-line arguments that several commands share."""

import argparse
from pathlib import Path


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `doc`, the docstring of the command's module."""
    return argparse.ArgumentParser(
        prog=f"lljax {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(to: argparse.ArgumentParser, workdir_help: str) -> None:
    """Adds --workdir or --model, one of which is required, and --adapter."""
    source = to.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help=workdir_help)
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
    to.add_argument("--adapter", type=Path, help="folder of a PEFT adapter of --model")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not (value := int(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
