"""Serve a base, a run or adapters behind the OpenAI API.

lljax serve --workdir=runs/quickstart
lljax serve --model=lljax/assets/tiny-512 --adapter=code=runs/quickstart/export/peft --port=8080
LLJAX_API_KEY=... lljax serve --workdir=runs/mine --host=0.0.0.0

A run is served beside its base: the models are called `base` and as the folder of the run. An
adapter is a folder in PEFT's format or of a run. SIGTERM and Ctrl-C let running requests end.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import parser, positive
from lljax.errors import ConfigError, exit_cleanly, first_line

CACHES = ("full", "bfloat16", "int8")
KEY = "LLJAX_API_KEY"
PLAIN = "plain"


def main(argv: Sequence[str]) -> None:
    """Serves until a signal."""
    arguments = _parser().parse_args(argv)
    with exit_cleanly():
        adapters, template = check(arguments)
        try:
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise ConfigError(
                "lljax serve needs starlette and uvicorn: pip install 'lljax[serve]'"
            ) from None
        # Imported here: --help and wrong flags need no jax.
        from lljax.hardware.compiler_flags import take_gpu_memory
        from lljax.parallel.processes import processes_on_host

        take_gpu_memory(processes_on_host)
        try:
            run(arguments, adapters, template)
        except KeyboardInterrupt:  # before the server listens
            sys.exit(130)


def run(arguments: argparse.Namespace, adapters: dict[str, str], template: str | None) -> None:
    """Opens the models of the flags, and serves them."""
    import jax.numpy as jnp

    from lljax.serving.opening import EngineOptions, open_adapters, open_run
    from lljax.serving.server import address, listen, serve
    from lljax.serving.service import Limits, Service

    sock = listen(arguments.host, arguments.port)
    options = EngineOptions(
        rows=arguments.slots,
        longest=arguments.longest,
        cache_dtype=None if arguments.cache == "full" else jnp.dtype(arguments.cache),
        prefix_bytes=int(arguments.prefix_cache * 2**30),
        chat_template=template,
    )
    if arguments.workdir:
        models, library = open_run(arguments.workdir, options)
    else:
        models, library = open_adapters(arguments.model, adapters, options)
    if arguments.compile:
        print(f"Compiling for up to {arguments.compile:,} tokens", flush=True)
        library.compile(arguments.compile)
    limits = Limits(
        api_key=arguments.api_key or os.environ.get(KEY) or None,
        max_body=arguments.max_body,
        slots=arguments.slots,
        queue=arguments.queue,
        timeout=arguments.timeout,
        allow_loading=arguments.allow_loading,
    )
    service = Service(models, limits, library)
    print(f"Serving {', '.join(models.names)} at {address(sock)}/v1", flush=True)
    serve(service, sock, arguments.drain)


def _parser() -> argparse.ArgumentParser:
    command = parser("serve", __doc__)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run: its base and its trained model")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter of --model: a folder in PEFT's format or of a run; may be repeated",
    )
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines, too")
    command.add_argument("--port", type=int, default=8000, help="0: any that is free")
    command.add_argument("--api_key", help=f"clients must send it; by default {KEY} is read")
    command.add_argument("--slots", type=positive, default=8, help="requests answered at once")
    command.add_argument("--queue", type=positive, default=64, help="requests that may wait")
    command.add_argument(
        "--longest", type=positive, help="tokens of a prompt and its answer; default: the model's"
    )
    command.add_argument(
        "--compile",
        type=positive,
        metavar="TOKENS",
        help="compile before listening for prompts and answers of up to so many tokens; by default "
        "the first request of a length compiles for its power of two",
    )
    command.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="dtype of keys and values; full: the dtype that the model computes in",
    )
    command.add_argument(
        "--prefix_cache",
        type=float,
        default=1.0,
        help="GiB for beginnings of prompts that later requests share; 0: none",
    )
    command.add_argument(
        "--chat_template",
        help=f"a Jinja file in place of the model's; {PLAIN}: lljax's own for a model without one",
    )
    command.add_argument("--max_body", type=positive, default=32 << 20, help="bytes of a request")
    command.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds until an answer must be complete"
    )
    command.add_argument(
        "--drain", type=float, default=60.0, help="seconds that requests may take after SIGTERM"
    )
    command.add_argument(
        "--allow_loading", action="store_true", help="let clients load and unload adapters"
    )
    return command


def check(arguments: argparse.Namespace) -> tuple[dict[str, str], str | None]:
    """The adapters by name, and the chat template.

    Raises:
      ConfigError: a flag cannot be used.
    """
    if arguments.workdir and arguments.adapter:
        raise ConfigError("--adapter and --workdir: a run has its own; use --model with --adapter")
    adapters: dict[str, str] = {}
    for text in arguments.adapter:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ConfigError(f"--adapter={text}: write --adapter=NAME=PATH")
        if name in adapters:
            raise ConfigError(f"--adapter={text}: {name} is the name of another adapter")
        adapters[name] = path
    for flag in ("prefix_cache", "timeout", "drain"):
        value = getattr(arguments, flag)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{flag}={value}: give a number of at least 0")
    if arguments.compile and arguments.longest and arguments.compile > arguments.longest:
        raise ConfigError(
            f"--compile={arguments.compile} and --longest={arguments.longest}: no request is "
            f"longer: use --compile={arguments.longest}"
        )
    template = arguments.chat_template
    if template and template != PLAIN:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--chat_template={template}: it cannot be read ({first_line(error)})"
            ) from None
    return adapters, template
