"""Tokens of a prompt: of a text, or of a conversation under the chat template."""

from collections.abc import Sequence
from typing import Any

from lljax.data.render import chat_text
from lljax.data.template import missing_bos


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with bos if training adds it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*missing_bos(tokenizer, text), *ids]


def chat_tokens(
    tokenizer: Any, messages: Sequence[dict], prefix: str = "", *, tools: Sequence[dict] = ()
) -> list[int]:
    """The tokens of a conversation and of the `prefix` of the reply. A template writes bos itself.

    tools: descriptions of the tools that the reply may call.

    Raises:
      TemplateRefusal: the template refuses the conversation.
      ModelError: the template does not end, or exceeds its memory.
    """
    text = chat_text(tokenizer, messages, tools=list(tools) or None) + prefix
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
