"""Command-line arguments that several commands share."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from lljax.errors import ConfigError, ModelError, printable, short


class Parser(argparse.ArgumentParser):
    """A parser that reports an error as every other error is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        fault = printable(message.removeprefix("argument "))[:300]
        self.exit(
            ConfigError.exit_code, f"ConfigError: {self.prog}: {fault}; see {self.prog} --help\n"
        )


def parser(command: str, doc: str | None) -> Parser:
    """A parser whose help begins with `doc`, the docstring of the command's module."""
    return Parser(
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


def check_model(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if the flags of `add_model` do not go together, or there is no adapter."""
    if arguments.workdir and arguments.adapter:
        raise ConfigError("--adapter and --workdir: a run has its own; use --model with --adapter")
    if arguments.adapter and not arguments.adapter.is_dir():
        raise ConfigError(f"--adapter={printable(str(arguments.adapter))}: there is no such folder")


@contextlib.contextmanager
def model_flag() -> Iterator[None]:
    """Names the flag --model in errors about the field `model.path`."""
    try:
        yield
    except ModelError as error:
        name, equals, rest = str(error).partition("=")
        if name != "model.path":
            raise
        raise ModelError(f"--model{equals}{rest}") from None


def _reader(convert: Callable[[str], Any], legal: Callable[[Any], bool], wanted: str) -> Any:
    """An argparse type. wanted: the legal values, in words that follow "is not"."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if legal(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{short(text)} is not {wanted}")

    return read


whole = _reader(int, lambda _: True, "a whole number")
positive = _reader(int, lambda value: value > 0, "a whole number above 0")
number = _reader(float, lambda _: True, "a number")
