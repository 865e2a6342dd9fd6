"""Continues a prompt, or talks, with a base, a base with an adapter, or with what a run trained.

python scripts/generate.py --workdir=runs/quickstart --prompt='def main():' --repetition_penalty=1.2
python scripts/generate.py --model=lljax/assets/tiny-512 --adapter=runs/quickstart/export/peft
--prompt='import os' python scripts/generate.py --workdir=runs/mine --chat --prompt='What does this
contract say about notice?' python scripts/generate.py --workdir=runs/mine --chat --system='You
answer in one sentence.'

--chat without a prompt is a conversation: /exit or Ctrl-D ends it, Ctrl-C cuts a reply short. Every
reply reads all of it anew.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lljax.data.template import with_template
from lljax.errors import ConfigError, exit_cleanly, first_line
from lljax.generation.chat import Chat, TooLong
from lljax.generation.detokenize import Detokenizer
from lljax.generation.generate import stream
from lljax.generation.prompt import text_tokens
from lljax.generation.sample import Sampling
from lljax.hardware.compiler_flags import take_gpu_memory
from lljax.interop.open import end_tokens
from lljax.run.open import of_base, of_run

CACHES = {"full": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}
CONTINUED, REPLY = 128, 1024  # tokens that are written where --tokens says nothing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run, whose trained model answers")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
    parser.add_argument(
        "--adapter", type=Path, help="folder of an adapter of --model, in PEFT's format"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt")
    text.add_argument("--prompt_file", type=Path)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message to a chat model; without a prompt, a conversation",
    )
    parser.add_argument(
        "--system", default="", help="with --chat: the system's message, which comes first"
    )
    parser.add_argument(
        "--tokens", type=int, help=f"written at most; by default {CONTINUED}, with --chat {REPLY:,}"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="a string that ends the text; may be given again",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="of keys and values; full: as the model computes",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    take_gpu_memory()
    with exit_cleanly():
        try:
            run(arguments)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains
            sys.exit(1)


def run(arguments) -> None:
    text, tokens, sampling = checked(arguments)
    writer = Writer(arguments, tokens, sampling)
    if arguments.chat:
        room = writer.longest - min(tokens, writer.longest // 2)
        chat = Chat(writer.tokenizer, room, arguments.system)
        if text is None:
            converse(writer, chat)
        else:
            writer.write(chat.ask(text))
        return
    prompt = text_tokens(writer.tokenizer, text)
    if not prompt:
        raise ConfigError("the prompt is empty")
    if len(prompt) >= writer.longest:
        raise ConfigError(
            f"the prompt takes {len(prompt):,} tokens, and the model reads {writer.longest:,}"
        )
    writer.write(prompt)


def checked(arguments) -> tuple[str | None, int, Sampling]:
    """The prompt, where there is one, how many tokens are written at most, and how they are chosen.

    Raises:
      ConfigError: flags that do not go together, or a value that cannot be used.
    """
    if arguments.workdir and arguments.adapter:
        raise ConfigError("--adapter and --workdir: a run has its own; use --model with --adapter")
    if arguments.system and not arguments.chat:
        raise ConfigError("--system without --chat: only a chat template has a place for it")
    if arguments.prompt is None and arguments.prompt_file is None and not arguments.chat:
        raise ConfigError(
            "name what to continue with --prompt or --prompt_file, or talk with --chat"
        )
    if "" in arguments.stop:
        raise ConfigError("--stop='': an empty string would end every text before it begins")
    if arguments.tokens is not None and arguments.tokens < 1:
        raise ConfigError(f"--tokens={arguments.tokens}: a number of at least 1")
    text = arguments.prompt
    if arguments.prompt_file:
        if not arguments.prompt_file.is_file():
            raise ConfigError(
                f"--prompt_file={arguments.prompt_file}: there is no such file, or it is "
                "not a regular one"
            )
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--prompt_file={arguments.prompt_file}: it cannot be read ({first_line(error)})"
            ) from None
    given = {"prompt": text or "", "system": arguments.system, "stop": "".join(arguments.stop)}
    for flag, value in given.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"--{flag}: it is not UTF-8") from None
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    return text, arguments.tokens or (REPLY if arguments.chat else CONTINUED), sampling


class Writer:
    """The model that was asked for, which shows its text as it writes it.

    longest: the tokens that it reads, those that it writes among them."""

    def __init__(self, arguments, tokens: int, sampling: Sampling):
        found = (
            of_run(arguments.workdir)
            if arguments.workdir
            else of_base(arguments.model, arguments.adapter)
        )
        self.tokenizer = with_template(found.base.tokenizer())
        self.longest = found.extended.max_length
        self._found, self._tokens, self._stop_strings = found, tokens, arguments.stop
        self._stop = end_tokens(found.base, self.tokenizer)
        self._how = {
            "sampling": sampling,
            "dtype": found.dtype,
            "layout": found.layout,
            "cache_dtype": CACHES[arguments.cache],
        }

    @functools.cached_property
    def model(self):
        return self._found.models[-1].load()

    def write(self, prompt: list[int]) -> str:
        """Continues `prompt`; returns what was shown. Ctrl-C ends it where it is."""
        text, count, pieces = Detokenizer(self.tokenizer, self._stop_strings), 0, []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            for (token,) in stream(
                self.model,
                [np.asarray(prompt)],
                **self._how,
                tokens=min(self._tokens, self.longest - len(prompt)),
            ):
                if int(token) in self._stop:
                    break
                count += 1
                show(text.add(int(token)))
                if text.ended:
                    break
        except KeyboardInterrupt:
            pass
        show(text.finish())
        print()
        print(f"({len(prompt):,} + {count:,} tokens)", file=sys.stderr)
        return "".join(pieces)


def converse(writer: Writer, chat: Chat) -> None:
    """Reads messages from the terminal, or lines from a pipe, and replies to each, until /exit or
    the end.
    """
    sys.stdin.reconfigure(errors="replace")
    _ = writer.model  # read before the first message is
    print("(/exit or Ctrl-D ends the conversation)", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text == "/exit":
            return
        if not text:
            continue
        before = chat.left_out
        try:
            prompt = chat.ask(text)
        except TooLong as error:
            print(f"({error}: say it in fewer words)", file=sys.stderr)
            continue
        if chat.left_out > before:
            print(
                f"(the conversation is longer than the {chat.room:,} tokens that the model reads "
                f"before a reply: its oldest {chat.left_out} messages are left out)",
                file=sys.stderr,
            )
        chat.add_reply(writer.write(prompt))


if __name__ == "__main__":
    main()
