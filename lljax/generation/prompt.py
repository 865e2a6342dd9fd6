"""Tokens of a prompt: of a text, or of a conversation under the chat template."""

from collections.abc import Sequence
from typing import Any

from lljax.data.render import chat_text
from lljax.data.template import missing_bos


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with bos if training adds it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*missing_bos(tokenizer, text), *ids]


def chat_tokens(tokenizer: Any, messages: Sequence[dict], prefix: str = "") -> list[int]:
    """The tokens of a conversation and of the `prefix` of the reply. A template writes bos itself.

    Raises:
      ModelError: the template refuses the conversation, or does not end.
    """
    text = chat_text(tokenizer, messages) + prefix
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
