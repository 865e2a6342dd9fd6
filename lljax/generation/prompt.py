"""The tokens that a model is given to read: of a text, or of a conversation under the chat
template.
"""

from collections.abc import Sequence

from lljax.data.render import chat_text
from lljax.data.template import missing_bos


def text_tokens(tokenizer, text: str) -> list[int]:
    """The tokens of a text, begun as texts are begun in training."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*missing_bos(tokenizer, text), *ids]


def chat_tokens(tokenizer, messages: Sequence[dict], begun: str = "") -> list[int]:
    """The tokens of `chat_text` and the `begun` reply after it; a template has bos where it wants
    it.

    Raises:
      ModelError: the template refuses it, or does not end.
    """
    text = chat_text(tokenizer, messages) + begun
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
