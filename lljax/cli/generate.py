"""Continue a prompt, or chat, with a base, a base and its adapter, or a trained model.

lljax generate --workdir=runs/quickstart --prompt='def main():' --repetition_penalty=1.2
lljax generate --model=lljax/assets/tiny-512 --adapter=runs/quickstart/export/peft --prompt='import'
lljax generate --workdir=runs/mine --chat --prompt='What does this contract say about notice?'
lljax generate --workdir=runs/mine --chat --system='You answer in one sentence.'

--chat without a prompt is a conversation: /exit or Ctrl-D ends it, Ctrl-C cuts a reply short.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import add_model, check_model, model_flag, number, parser, positive, whole
from lljax.errors import ConfigError, exit_cleanly, first_line

CACHES = ("full", "bfloat16", "int8")
CONTINUED, REPLY = 128, 1024  # tokens to write by default: after a prompt, in a chat


def main(argv: Sequence[str]) -> None:
    """Writes the continuation to stdout, and the count of tokens to stderr."""
    arguments = _parser().parse_args(argv)
    with exit_cleanly():
        check(arguments)
        arguments.tokens = arguments.tokens or (REPLY if arguments.chat else CONTINUED)
        text = prompt_text(arguments)
        try:
            # Imported here: --help and wrong flags need no jax.
            from lljax.cli.writer import write
            from lljax.hardware.compiler_flags import take_gpu_memory
            from lljax.parallel.processes import processes_on_host

            take_gpu_memory(processes_on_host)
            with model_flag():
                write(arguments, text)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `| head` has read enough
            # or Python complains at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    command = parser("generate", __doc__)
    add_model(command, "a run, whose trained model answers")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--prompt")
    text.add_argument("--prompt_file", type=Path)
    command.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message to a chat model; without a prompt, a conversation",
    )
    command.add_argument("--system", default="", help="with --chat: the system message")
    command.add_argument(
        "--tokens",
        type=positive,
        help=f"written at most; by default {CONTINUED}, with --chat {REPLY:,}",
    )
    command.add_argument("--temperature", type=number, default=0.0)
    command.add_argument("--top_k", type=whole, default=0, help="0: all tokens")
    command.add_argument("--top_p", type=number, default=1.0)
    command.add_argument("--min_p", type=number, default=0.0)
    command.add_argument("--repetition_penalty", type=number, default=1.0)
    command.add_argument(
        "--stop", action="append", default=[], help="a string that ends the text; may be repeated"
    )
    command.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="dtype of keys and values; full: the dtype that the model computes in",
    )
    command.add_argument("--seed", type=whole, default=0)
    return command


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that exclude each other and for values that cannot be used."""
    check_model(arguments)
    if arguments.system and not arguments.chat:
        raise ConfigError("--system without --chat: only a chat template has a place for it")
    if arguments.prompt is None and arguments.prompt_file is None and not arguments.chat:
        raise ConfigError("give a prompt with --prompt or --prompt_file, or talk with --chat")
    if "" in arguments.stop:
        raise ConfigError("--stop='': an empty string would end every text before it begins")
    for flag, value in (
        ("prompt", arguments.prompt or ""),
        ("system", arguments.system),
        ("stop", "".join(arguments.stop)),
    ):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"--{flag}: it is not UTF-8") from None


def prompt_text(arguments: argparse.Namespace) -> str | None:
    """The prompt of --prompt or --prompt_file; None if neither is given.

    Raises:
      ConfigError: the file cannot be read.
    """
    file = arguments.prompt_file
    if not file:
        return arguments.prompt
    if not file.is_file():
        raise ConfigError(
            f"--prompt_file={file}: there is no such file, or it is not a regular one"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--prompt_file={file}: it cannot be read ({first_line(error)})"
        ) from None
