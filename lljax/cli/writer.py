"""The work of `lljax generate`: text written token by token."""

import argparse
import functools
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from lljax.data.template import with_template
from lljax.errors import ConfigError
from lljax.generation.chat import Chat, TooLong
from lljax.generation.detokenize import Detokenizer
from lljax.generation.generate import stream
from lljax.generation.prompt import text_tokens
from lljax.generation.sample import Sampling
from lljax.interop.open import end_tokens
from lljax.models.decoder import Decoder
from lljax.run.open import open_base_models, open_run_models


def write(arguments: argparse.Namespace, text: str | None) -> None:
    """Continues `text`, answers it as a chat message, or talks if it is None.

    arguments: the flags of `lljax generate`.

    Raises:
      ConfigError: an illegal value, or a prompt that is empty or too long.
    """
    writer = Writer(arguments)
    if arguments.chat:
        room = writer.longest - min(writer.tokens, writer.longest // 2)
        chat = Chat(writer.tokenizer, room, arguments.system)
        if text is None:
            converse(writer, chat)
        else:
            writer.write(chat.ask(text))
        return
    prompt = text_tokens(writer.tokenizer, text or "")
    if not prompt:
        raise ConfigError("the prompt is empty")
    if len(prompt) >= writer.longest:
        raise ConfigError(
            f"the prompt takes {len(prompt):,} tokens, and the model reads {writer.longest:,}"
        )
    writer.write(prompt)


class Writer:
    """The model of the flags, and how it writes. The weights are read on first use.

    longest: tokens that the model reads, its own answer included. tokens: written at most.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._sampling = Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition=arguments.repetition_penalty,
            seed=arguments.seed,
        )
        self._candidates = (
            open_run_models(arguments.workdir)
            if arguments.workdir
            else open_base_models(arguments.model, arguments.adapter)
        )
        base: Any = self._candidates.base
        self.tokenizer = with_template(base.tokenizer())
        self.longest = self._candidates.extended.max_length
        self.tokens = arguments.tokens
        self._stop_strings = arguments.stop
        self._stop = end_tokens(base, self.tokenizer)
        self._cache_dtype = None if arguments.cache == "full" else jnp.dtype(arguments.cache)

    @functools.cached_property
    def model(self) -> Decoder:
        return self._candidates.models[-1].load()

    def write(self, prompt: list[int]) -> str:
        """Prints the continuation of `prompt` as it is written, and returns it.

        Ctrl-C ends it.
        """
        text, count, pieces = Detokenizer(self.tokenizer, self._stop_strings), 0, []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            for (token,) in stream(
                self.model,
                [np.asarray(prompt)],
                sampling=self._sampling,
                dtype=self._candidates.dtype,
                layout=self._candidates.layout,
                cache_dtype=self._cache_dtype,
                tokens=min(self.tokens, self.longest - len(prompt)),
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
    """Reads messages from the terminal, or lines from a pipe, and replies to them until /exit or
    the end of the input.
    """
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    _ = writer.model  # read before the first message
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
