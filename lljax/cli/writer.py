"""The work of `lljax generate`: text written token by token."""

import argparse
import functools
import sys
from typing import Any

import jax.numpy as jnp

from lljax.data.prompt_tokens import text_tokens
from lljax.data.template import with_template
from lljax.errors import ConfigError
from lljax.generation.chat import Chat, TooLong
from lljax.generation.completion import Request
from lljax.generation.engine import Engine
from lljax.generation.sample import Sampling
from lljax.interop.open import end_tokens
from lljax.models.by_layer import split_layers
from lljax.models.cache import cache_bytes
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
    def engine(self) -> Engine:
        model = split_layers(self._candidates.models[-1].load())
        dtype = self._candidates.dtype
        cache_dtype = self._cache_dtype or dtype
        return Engine(
            model,
            self.tokenizer,
            rows=1,
            dtype=dtype,
            cache_dtype=cache_dtype,
            # for a conversation, which every reply continues
            prefix_bytes=cache_bytes(model.spec, self.longest, cache_dtype),
            layout=self._candidates.layout,
        )

    def write(self, prompt: list[int]) -> str:
        """Prints the continuation of `prompt` as it is written, and returns it.

        Ctrl-C ends it.
        """
        request = Request(
            prompt,
            tokens=min(self.tokens, self.longest - len(prompt)),
            sampling=self._sampling,
            stop=self._stop,
            stop_strings=tuple(self._stop_strings),
        )
        growing = self.engine.submit(request, lambda piece: print(piece.text, end="", flush=True))
        while growing.reason is None:
            try:
                self.engine.step()
            except KeyboardInterrupt:
                self.engine.cancel(growing)
        print()
        completion = growing.completion()
        print(f"({len(prompt):,} + {len(completion.tokens):,} tokens)", file=sys.stderr)
        return completion.text or ""


def converse(writer: Writer, chat: Chat) -> None:
    """Reads messages from the terminal, or lines from a pipe, and replies to them until /exit or
    the end of the input.
    """
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    _ = writer.engine  # the weights are read before the first message
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
