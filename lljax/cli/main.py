"""The `lljax` command: dispatches to a table of commands."""

import dataclasses
import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from lljax.cli.process import compile_without_devices, leave_on_signals
from lljax.errors import ConfigError, exit_cleanly, short

HELP = ("-h", "-help", "--help")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    module: imported when the command runs; its `main(argv)` takes the arguments after the name.
    help: one line.
    setup: sets up the process before the module is imported.
    """

    module: str
    help: str
    setup: Callable[[], None] | None = None


COMMANDS = {
    "train": Command(
        module="lljax.cli.train",
        help="train from a config file; the same command again resumes",
        setup=leave_on_signals,
    ),
    "align": Command(
        module="lljax.cli.align",
        help="train on preferences, or on rewards of a model's own answers",
        setup=leave_on_signals,
    ),
    "evaluate": Command(
        module="lljax.cli.evaluate", help="measure perplexity and retrieval by length"
    ),
    "export": Command(
        module="lljax.cli.export", help="write an adapter or checkpoint for PyTorch and vLLM"
    ),
    "push": Command(
        module="lljax.cli.push", help="upload an export to the HuggingFace hub with a model card"
    ),
    "generate": Command(module="lljax.cli.generate", help="continue a prompt, or chat"),
    "serve": Command(module="lljax.cli.serve", help="answer requests of the OpenAI API"),
    "plan": Command(
        module="lljax.cli.plan",
        help="compile a run for devices that are not here: does it fit, how long does it take",
        setup=compile_without_devices,
    ),
    "data": Command(
        module="lljax.cli.data", help="make, check, measure and show training documents"
    ),
    "report": Command(module="lljax.cli.report", help="write the report of a run"),
    "config": Command(
        module="lljax.cli.config", help="list the fields of a config: types, defaults, comments"
    ),
}


def run(*argv: str) -> None:
    """The entry point of the process `lljax` and of scripts/: sets up the process for the command,
    then runs it. From Python, call `main`.

    argv: the command and its arguments, by default from sys.argv.
    """
    arguments = argv or tuple(sys.argv[1:])
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command and command.setup:
        command.setup()
    main(arguments)


def main(argv: Sequence[str]) -> None:
    """Runs the command argv[0] with the arguments after it; without one, lists the commands.

    Raises:
      SystemExit: with the exit code of an error, which is printed as one line.
    """
    name, *arguments = argv or ["--help"]
    if name in HELP:
        from lljax.config.flags import show  # imported here: a command starts sooner

        show(usage())
        return
    if name == "--version":
        print(f"lljax {importlib.metadata.version('lljax')}")
        return
    with exit_cleanly():
        command = _command(name)
    importlib.import_module(command.module).main(arguments)


def usage() -> str:
    """The help of `lljax`: all commands, one per line."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: lljax COMMAND [FLAGS]",
            "",
            "Teach a HuggingFace LLM to read long documents.",
            "",
            *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
            "",
            "`lljax COMMAND --help` shows examples and flags; `lljax --version` the version.",
        ]
    )


def _command(name: str) -> Command:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"lljax: there is no command {short(name)}: {hint}")
    return COMMANDS[name]
