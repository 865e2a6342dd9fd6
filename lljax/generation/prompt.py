"""What a chat model is given to read: a conversation, rendered by the tokenizer's chat template."""

from collections.abc import Sequence

from lljax.data.render import chat_text


def chat_tokens(tokenizer, messages: Sequence[dict], begun: str = "") -> list[int]:
    """The tokens of `chat_text` and the `begun` reply after it; a template has bos where it wants it.

    Raises:
      ModelError: the template refuses it, or does not end.
    """
    text = chat_text(tokenizer, messages) + begun
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
